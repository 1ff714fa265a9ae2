"""The state of a stopped machine, all of it but the memory: capture and apply."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvmmig.errors import KvmError, StateMismatch
from kvmmig.kvm import Vcpu, Vm, abi
from kvmmig.machine.devices import DEVICE_VERSIONS, Serial, SystemControlA
from kvmmig.machine.serial import MOST_STATE

_VERSION = 1
_MSR_TSC_DEADLINE = 0x6E0
_WALL_CLOCK = (0x11, 0x4B564D00)  # MSR_KVM_WALL_CLOCK and MSR_KVM_WALL_CLOCK_NEW: one value, the VM's
_MSR_ENTRY = struct.Struct("<IIQ")  # kvm_msr_entry
S = TypeVar("S", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class StateSection:
    """One named and versioned piece of a stopped machine: ``cpu0/regs``, ``vm/clock``, ``dev/serial``."""

    name: str
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Parts:
    """What has state. ``msrs`` are the numbers of those that are saved; all vCPUs are parked."""

    vm: Vm
    vcpus: Sequence[Vcpu]
    irqchip: bool
    msrs: Sequence[int]
    serial: Serial
    system_control: SystemControlA


@dataclass(frozen=True, slots=True)
class _Piece:
    """``size`` is in bytes; where it is not ``exact`` it is the most, and ``load`` checks the length."""

    name: str
    size: int
    save: Callable[[], bytes]
    load: Callable[[bytes], None]
    version: int = _VERSION
    exact: bool = True


def capture(parts: Parts) -> list[StateSection]:
    """All state sections, in the order in which `apply` wants them. Dozens of ioctls: not for the event loop.

    Raises `KvmError` that names the section.
    """
    sections = []
    for piece in _pieces(parts):
        try:
            sections.append(StateSection(piece.name, piece.version, piece.save()))
        except KvmError as error:
            raise _named(piece.name, "read", error) from error
    return sections


def section_sizes(parts: Parts) -> dict[str, int]:
    """The names of all sections, and the most bytes that each can have."""
    return {piece.name: piece.size for piece in _pieces(parts)}


def apply(parts: Parts, sections: Iterable[StateSection], leave_out: Collection[str] = ()) -> None:
    """Put captured state into a machine that has not run yet. The sections may come in any order.

    Those named in ``leave_out`` stay as they are, and need not be among ``sections``.

    Raises `StateMismatch` before anything is changed when a section is missing, unknown, there twice, or of
    the wrong version or length. A `StateMismatch` or `KvmError` about a section's content, or from an ioctl,
    comes later and leaves a machine that is fit only to be closed.
    """
    every = _pieces(parts)
    names = {piece.name for piece in every}
    if unknown := sorted(set(leave_out) - names):
        raise StateMismatch(
            f"this machine has no state section {', '.join(unknown)} to leave out; it has "
            + ", ".join(piece.name for piece in every)
        )
    given = _by_name(sections, names, names - set(leave_out))
    pieces = [piece for piece in every if piece.name not in leave_out]
    for piece in pieces:
        section = given[piece.name]
        if section.version != piece.version:
            raise StateMismatch(
                f"the state section {piece.name!r} has version {section.version}, and only version "
                f"{piece.version} is understood here; use the same kvmmig on both sides"
            )
        if piece.exact and len(section.data) != piece.size:
            raise StateMismatch(
                f"the state section {piece.name!r} has {len(section.data)} bytes instead of {piece.size}"
            )
    for piece in pieces:
        try:
            piece.load(given[piece.name].data)
        except KvmError as error:
            raise _named(piece.name, "set", error) from error
        except StateMismatch as error:
            raise StateMismatch(f"the state section {piece.name!r}: {error}") from error


# The order, which is the same for reading and for setting, and its reasons (kernel: virt/kvm/api.rst).
# CPUID was set when the machine was built: it sizes XSAVE and makes MSRs valid.
#
#   tsc-khz       before the TSC, which is an MSR counted in it
#   mp-state      read before registers and LAPIC: reading it may accept an INIT or SIPI, which changes CS:RIP
#   regs          before vcpu events: setting registers drops a pending exception
#   sregs         before the LAPIC: the APIC's base and mode are in it
#   xsave, xcrs, debugregs: at any place
#   lapic         before the MSRs, some of which are its own
#   msrs          the TSC among them
#   tsc-deadline  after the TSC and the LAPIC, which must be in deadline mode by then
#   events        last of a vCPU: it holds what is in the middle of being delivered
#   pit, clock, pic-master, pic-slave, ioapic: of the VM, after its vCPUs: an interrupt that the IOAPIC
#                 resends must find the LAPICs in place
#   wall-clock    after the clock, by which KVM reckons the time of the guest's boot, and writes it into guest
#                 memory at once
#   devices       last: their interrupt lines go into the chips, whose state knows them as high already
def _pieces(parts: Parts) -> list[_Piece]:
    pieces: list[_Piece] = []
    for index, vcpu in enumerate(parts.vcpus):
        pieces += _vcpu_pieces(f"cpu{index}", vcpu, parts)
    pieces += _vm_pieces(parts)
    pieces += _device_pieces(parts)
    return pieces


def _vcpu_pieces(cpu: str, vcpu: Vcpu, parts: Parts) -> Iterator[_Piece]:
    yield _Piece(
        f"{cpu}/tsc-khz",
        4,
        lambda: vcpu.get_tsc_khz().to_bytes(4, "little"),
        lambda data: _set_tsc_khz(vcpu, int.from_bytes(data, "little")),
    )
    if parts.irqchip:
        yield _structure(f"{cpu}/mp-state", abi.kvm_mp_state, vcpu.get_mp_state, vcpu.set_mp_state)
    yield _structure(f"{cpu}/regs", abi.kvm_regs, vcpu.get_regs, vcpu.set_regs)
    yield _structure(f"{cpu}/sregs", abi.kvm_sregs, vcpu.get_sregs, vcpu.set_sregs)
    yield _structure(f"{cpu}/xsave", abi.kvm_xsave, vcpu.get_xsave, vcpu.set_xsave)
    yield _structure(f"{cpu}/xcrs", abi.kvm_xcrs, vcpu.get_xcrs, vcpu.set_xcrs)
    yield _structure(f"{cpu}/debugregs", abi.kvm_debugregs, vcpu.get_debugregs, vcpu.set_debugregs)
    if parts.irqchip:
        yield _structure(f"{cpu}/lapic", abi.kvm_lapic_state, vcpu.get_lapic, vcpu.set_lapic)
    apart = (_MSR_TSC_DEADLINE, *_WALL_CLOCK)
    yield _msrs(f"{cpu}/msrs", vcpu, [index for index in parts.msrs if index not in apart])
    if _MSR_TSC_DEADLINE in parts.msrs:
        yield _msrs(f"{cpu}/tsc-deadline", vcpu, [_MSR_TSC_DEADLINE])
    yield _structure(f"{cpu}/events", abi.kvm_vcpu_events, vcpu.get_vcpu_events, vcpu.set_vcpu_events)


def _vm_pieces(parts: Parts) -> Iterator[_Piece]:
    vm = parts.vm
    if parts.irqchip:
        yield _structure("vm/pit", abi.kvm_pit_state2, vm.get_pit2, vm.set_pit2)
    yield _structure("vm/clock", abi.kvm_clock_data, vm.get_clock, lambda clock: _set_clock(vm, clock))
    if parts.irqchip:
        yield _chip("vm/pic-master", vm, abi.KVM_IRQCHIP_PIC_MASTER)
        yield _chip("vm/pic-slave", vm, abi.KVM_IRQCHIP_PIC_SLAVE)
        yield _chip("vm/ioapic", vm, abi.KVM_IRQCHIP_IOAPIC)
    if wall_clock := [index for index in parts.msrs if index in _WALL_CLOCK]:
        yield _msrs("vm/wall-clock", parts.vcpus[0], wall_clock)


def _device_pieces(parts: Parts) -> Iterator[_Piece]:
    serial, control = parts.serial, parts.system_control
    yield _Piece("dev/serial", MOST_STATE, serial.save, serial.load, DEVICE_VERSIONS["serial"], exact=False)
    yield _Piece("dev/system-control", 1, control.save, control.load, DEVICE_VERSIONS["system-control"])


def _structure(name: str, kind: type[S], get: Callable[[], S], put: Callable[[S], None]) -> _Piece:
    """A piece that is one of the kernel's structures, byte for byte."""
    return _Piece(
        name,
        ctypes.sizeof(kind),
        lambda: bytes(get()),
        lambda data: put(kind.from_buffer_copy(data)),
    )


def _chip(name: str, vm: Vm, chip_id: int) -> _Piece:
    def put(chip: abi.kvm_irqchip) -> None:
        if chip.chip_id != chip_id:
            raise StateMismatch(f"it holds the state of chip {chip.chip_id} instead of chip {chip_id}")
        vm.set_irqchip(chip)

    return _structure(name, abi.kvm_irqchip, lambda: vm.get_irqchip(chip_id), put)


def _msrs(name: str, vcpu: Vcpu, indices: Sequence[int]) -> _Piece:
    """MSRs as an array of ``kvm_msr_entry``; the same ones, in the same order, on both sides."""

    def save() -> bytes:
        values = vcpu.get_msrs(indices)
        return b"".join(_MSR_ENTRY.pack(index, 0, value) for index, value in values.items())

    def load(data: bytes) -> None:
        entries = [(index, value) for index, _, value in _MSR_ENTRY.iter_unpack(data)]
        if [index for index, _ in entries] != list(indices):
            raise StateMismatch("it holds other MSRs than the machine's description says")
        for index, value in entries:
            _set_msr(vcpu, index, value)

    return _Piece(name, _MSR_ENTRY.size * len(indices), save, load)


def _set_msr(vcpu: Vcpu, index: int, value: int) -> None:
    """KVM lists MSRs that it won't set; that matters only where the fresh vCPU has another value."""
    try:
        vcpu.set_msrs({index: value})
    except KvmError as error:
        fresh = vcpu.get_msrs([index])[index]
        if fresh != value:
            raise StateMismatch(
                f"this host does not take {value:#x} for MSR {index:#x} and leaves it at {fresh:#x}"
            ) from error


def _set_tsc_khz(vcpu: Vcpu, khz: int) -> None:
    if khz != vcpu.get_tsc_khz():  # hosts that can't scale refuse even their own frequency
        vcpu.set_tsc_khz(khz)


def _set_clock(vm: Vm, clock: abi.kvm_clock_data) -> None:
    """Without KVM_CLOCK_REALTIME kvmclock stands still while the guest moves, as its TSC does."""
    clock.flags = 0
    vm.set_clock(clock)


def _by_name(sections: Iterable[StateSection], known: set[str], wanted: set[str]) -> dict[str, StateSection]:
    given: dict[str, StateSection] = {}
    for section in sections:
        if section.name in given:
            raise StateMismatch(f"the state section {section.name!r} is there twice")
        given[section.name] = section
    if unknown := sorted(given.keys() - known):
        raise StateMismatch(f"this machine has no place for the state sections {', '.join(unknown)}")
    if missing := sorted(wanted - given.keys()):
        raise StateMismatch(f"the state sections {', '.join(missing)} are missing")
    return given


def _named(name: str, verb: str, error: KvmError) -> KvmError:
    return KvmError(
        f"the state section {name!r} can't be {verb}: {error}", operation=error.operation, errno=error.errno
    )
