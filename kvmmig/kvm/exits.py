"""Why a vCPU came back from KVM_RUN, as small values made for ``match``.

    match vcpu.run():
        case IoOut(port, size, data): ...
        case IoIn(port, size, count): vcpu.complete_in(bytes(size * count))
        case Hlt(): ...

They are copies: none of them looks into the run area, which the next `Vcpu.run` overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap

from kvmmig.kvm import abi


@dataclass(frozen=True, slots=True)
class IoOut:
    """The guest wrote ``data`` to ``port``: one item of ``size`` bytes, or several from a string instruction.

    Iterate over it for the items one by one.
    """

    port: int
    size: int
    data: bytes

    def __iter__(self) -> Iterator[bytes]:
        return (self.data[at : at + self.size] for at in range(0, len(self.data), self.size))


@dataclass(frozen=True, slots=True)
class IoIn:
    """The guest reads ``count`` items of ``size`` bytes from ``port``: answer by `Vcpu.complete_in`."""

    port: int
    size: int
    count: int


@dataclass(frozen=True, slots=True)
class MmioWrite:
    """The guest wrote ``data`` (1 to 8 bytes) to a physical ``address`` that no memory slot covers."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MmioRead:
    """The guest reads ``size`` bytes (1 to 8) from ``address``: answer by `Vcpu.complete_in`."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Hlt:
    """The guest halted. With an in-kernel irqchip the kernel waits for the interrupt itself instead."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A triple fault."""


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM could not go on; ``suberror`` is KVM_INTERNAL_ERROR_..., ``data`` what it says about it."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The CPU refused to enter the guest; ``reason`` is the hardware's own number, ``cpu`` the host CPU."""

    reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """The guest asked for a reset or a shutdown, or crashed; ``type`` is KVM_SYSTEM_EVENT_..."""

    type: int
    flags: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal came, or `Vcpu.request_immediate_exit` was set. Whatever access was pending is completed."""


@dataclass(frozen=True, slots=True)
class IrqWindowOpen:
    """The guest can take an interrupt now, as ``run_area.request_interrupt_window`` asked."""


@dataclass(frozen=True, slots=True)
class Debug:
    """A debug exception that the host asked to see; ``pc`` is a linear address."""

    exception: int
    pc: int


@dataclass(frozen=True, slots=True)
class UnknownExit:
    """An exit that kvmmig has no use for; ``reason`` is KVM_EXIT_..."""

    reason: int


Exit = (
    IoOut
    | IoIn
    | MmioWrite
    | MmioRead
    | Hlt
    | Shutdown
    | InternalError
    | FailEntry
    | SystemEvent
    | Interrupted
    | IrqWindowOpen
    | Debug
    | UnknownExit
)

# Exits without content are made once: there is nothing in them to tell apart.
INTERRUPTED = Interrupted()
_HLT = Hlt()
_SHUTDOWN = Shutdown()
_IRQ_WINDOW_OPEN = IrqWindowOpen()


def _io(run: abi.kvm_run, area: mmap) -> Exit:
    io = run.io
    size = io.size
    if io.direction == abi.KVM_EXIT_IO_IN:
        return IoIn(io.port, size, io.count)
    start = io.data_offset
    return IoOut(io.port, size, area[start : start + size * io.count])


def _mmio(run: abi.kvm_run, area: mmap) -> Exit:
    mmio = run.mmio
    if mmio.is_write:
        return MmioWrite(mmio.phys_addr, bytes(mmio.data[: mmio.len]))
    return MmioRead(mmio.phys_addr, mmio.len)


def _internal_error(run: abi.kvm_run, area: mmap) -> Exit:
    internal = run.internal
    return InternalError(internal.suberror, tuple(internal.data[: internal.ndata]))


def _fail_entry(run: abi.kvm_run, area: mmap) -> Exit:
    return FailEntry(run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu)


def _system_event(run: abi.kvm_run, area: mmap) -> Exit:
    event = run.system_event
    return SystemEvent(event.type, event.data[0])


def _debug(run: abi.kvm_run, area: mmap) -> Exit:
    return Debug(run.debug.arch.exception, run.debug.arch.pc)


_DECODERS: dict[int, Callable[[abi.kvm_run, mmap], Exit]] = {
    abi.KVM_EXIT_IO: _io,
    abi.KVM_EXIT_MMIO: _mmio,
    abi.KVM_EXIT_HLT: lambda run, area: _HLT,
    abi.KVM_EXIT_SHUTDOWN: lambda run, area: _SHUTDOWN,
    abi.KVM_EXIT_INTR: lambda run, area: INTERRUPTED,
    abi.KVM_EXIT_IRQ_WINDOW_OPEN: lambda run, area: _IRQ_WINDOW_OPEN,
    abi.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    abi.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    abi.KVM_EXIT_SYSTEM_EVENT: _system_event,
    abi.KVM_EXIT_DEBUG: _debug,
}


def decode(reason: int, run: abi.kvm_run, area: mmap) -> Exit:
    """What KVM_EXIT ``reason`` and the run area say, as one of the classes above."""
    decoder = _DECODERS.get(reason)
    return decoder(run, area) if decoder else UnknownExit(reason)
