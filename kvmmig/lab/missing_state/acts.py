"""What the host does to a machine in some of the proofs, and what it takes away."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

from kvmmig.errors import KvmUnavailable, WrongState
from kvmmig.kvm import System, abi
from kvmmig.machine import Machine, State
from kvmmig.machine.cpu import Ending

#: IA32_TIME_STAMP_COUNTER
TSC = 0x10
_PIN = 11
_FAR_AHEAD = 1 << 60  # more cycles than any host has been up for

Spoil = Callable[[bytes, bytes], bytes]


# Interrupts


def raise_line(irq: int) -> Callable[[Machine, int], None]:
    """A device's interrupt line goes up."""
    return lambda machine, cpu: machine.vm.irq_line(irq, True)


def lead_pin(machine: Machine, cpu: int) -> None:
    """A pin of the IOAPIC leads to vector 0x60 of this vCPU."""
    chip = machine.vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[_PIN] = cpu << 56 | 0x60
    machine.vm.set_irqchip(chip)


async def interrupt(machine: Machine, cpu: int) -> Ending:
    """Raise that pin, and wait for the end."""
    machine.vm.irq_line(_PIN, True)
    return await machine.wait()


async def interrupt_when_halted(machine: Machine, cpu: int) -> Ending:
    """Raise it once the vCPU is halted indeed: one that goes on must not be taken for one that was woken."""
    while True:
        try:
            await machine.pause()
        except WrongState:
            assert machine.state is State.ENDED
            return await machine.wait()
        now = machine.vcpus[cpu].get_mp_state().mp_state
        if now == abi.KVM_MP_STATE_UNINITIALIZED:  # it would wait for its startup interrupt for ever
            await machine.end()
            return await machine.wait()
        await machine.start()
        if now == abi.KVM_MP_STATE_HALTED:
            return await interrupt(machine, cpu)


# Devices, clocks, features


def type_forty_bytes(machine: Machine, cpu: int) -> None:
    """More than the UART's own 16."""
    machine.serial.feed(bytes(range(40)))


def set_kvmclock_far_ahead(machine: Machine, cpu: int) -> None:
    """11 days, in nanoseconds; a fresh one begins at 0."""
    machine.vm.set_clock(abi.kvm_clock_data(clock=10**15))


def set_tsc_far_ahead(machine: Machine, cpu: int) -> None:
    machine.vcpus[cpu].set_msrs({TSC: _FAR_AHEAD})


def why_no_tsc() -> str:
    """What is in the way of a guest that has a TSC of its own, or nothing."""
    try:
        with System.open() as system, system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            vcpu.set_msrs({TSC: _FAR_AHEAD})
            taken = vcpu.get_msrs([TSC])[TSC] >= _FAR_AHEAD
    except KvmUnavailable as error:
        return str(error)
    return "" if taken else "this KVM gives guests the host's TSC: it accepts another value and ignores it"


def double_tsc_khz(machine: Machine, cpu: int) -> None:
    """Unlike what the description says, by which the twin is built."""
    machine.vcpus[cpu].set_tsc_khz(2 * machine.description.tsc_khz)


def switch_avx_on(machine: Machine, cpu: int) -> None:
    """As a machine does where KVM lists AVX as supported; some KVMs have it and do not say so."""
    vcpu = machine.vcpus[cpu]
    if not any(entry.function == 1 and entry.ecx >> 28 & 1 for entry in vcpu.get_cpuid2()):
        return
    sregs = vcpu.get_sregs()
    sregs.cr4 |= 1 << 18  # OSXSAVE
    vcpu.set_sregs(sregs)
    xcrs = vcpu.get_xcrs()
    xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, 7  # x87, SSE, AVX
    vcpu.set_xcrs(xcrs)


def leave_avx_off(machine: Machine, cpu: int) -> None:
    """XCR0 with x87 and SSE alone: neither a fresh vCPU's value nor that which a program starts with."""
    xcrs = machine.vcpus[cpu].get_xcrs()
    xcrs.xcrs[0].value = 3
    machine.vcpus[cpu].set_xcrs(xcrs)


def offer_tsc_deadline(machine: Machine, cpu: int) -> None:
    """KVM's list of supported features leaves this one to the VMM."""
    for vcpu in machine.vcpus:
        vcpu.set_cpuid2(
            entry._replace(ecx=entry.ecx | 1 << 24) if entry.function == 1 else entry
            for entry in vcpu.get_cpuid2()
        )


# What is taken away: from a section's data and that of a machine that never ran, the data without a part


def all_but_rip(data: bytes, fresh: bytes) -> bytes:
    """`kvm_regs` with its RIP alone: the guest goes on at the right place."""
    regs = abi.kvm_regs.from_buffer_copy(fresh)
    regs.rip = abi.kvm_regs.from_buffer_copy(data).rip
    return bytes(regs)


def fields(kind: type[ctypes.Structure], *names: str) -> dict[str, Spoil]:
    """One of the kernel's structures without one of these fields, each by its name."""
    return {
        name: span(getattr(kind, name).offset, getattr(kind, name).offset + getattr(kind, name).size)
        for name in names
    }


def in_chip(field: str) -> dict[str, Spoil]:
    """A PIC's `kvm_irqchip` without one of its registers."""
    offset = abi.kvm_irqchip.chip.offset + getattr(abi.kvm_pic_state, field).offset
    return {field: span(offset, offset + 1)}


def span(*bounds: int) -> Spoil:
    """The bytes of these half-open spans (begin, end, begin, end, ...) are as in a fresh machine."""

    def spoil(data: bytes, fresh: bytes) -> bytes:
        mixed = bytearray(data)
        for begin, end in zip(bounds[::2], bounds[1::2], strict=True):
            mixed[begin:end] = fresh[begin:end]
        return bytes(mixed)

    return spoil


def no_bytes_in_flight(data: bytes, fresh: bytes) -> bytes:
    """The serial port's state without what was typed; its head ends with two 16-bit counts."""
    return data[: len(fresh) - 4] + bytes(4)


def msr(*indices: int) -> Spoil:
    """An ``msrs`` section in which these are as in a fresh machine."""

    def spoil(data: bytes, fresh: bytes) -> bytes:
        values, defaults = msr_values(data), msr_values(fresh)
        values |= {index: defaults[index] for index in indices}
        return b"".join(struct.pack("<IIQ", index, 0, value) for index, value in values.items())

    return spoil


def msr_values(data: bytes) -> dict[int, int]:
    """An ``msrs`` section as {number: value}."""
    return dict(struct.iter_unpack("<I4xQ", data))
