"""The report on a guest that crashed: one block of text with what a person would look at first."""

from __future__ import annotations

from kvmmig.errors import KvmError
from kvmmig.kvm import Exit, FailEntry, InternalError, Shutdown, UnknownExit, Vcpu
from kvmmig.kvm.abi import (
    KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    kvm_regs,
    kvm_sregs,
)
from kvmmig.machine.diagnosis import decode, likely_cause
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory

_GENERAL = [name for name, _ in kvm_regs._fields_][:16]
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr")
_CODE_BYTES = 16
_WORD = (1 << 64) - 1
_INTERNAL = {
    KVM_INTERNAL_ERROR_EMULATION: "KVM could not emulate an instruction",
    KVM_INTERNAL_ERROR_SIMUL_EX: "KVM met an exception while it delivered another",
    KVM_INTERNAL_ERROR_DELIVERY_EV: "KVM could not deliver an event",
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "the CPU left the guest for a reason that KVM does not know",
}


def report(index: int, cpus: int, vcpu: Vcpu, memory: GuestMemory, what: str) -> str:
    """What happened to vCPU ``index`` of ``cpus``, the instruction and the likely cause, its registers.

    For the vCPU's thread.
    """
    lines = [f"vCPU {index}: {what}"]
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except KvmError as error:
        return f"{lines[0]}\n  its registers can't be read: {error}"
    code = code_at(vcpu, memory, regs.rip, _CODE_BYTES, sregs)
    at = decode(code, regs.rip, sregs) if code else None
    lines.append(f"  at {place(regs, sregs)}: {at or 'no instruction'}")
    if cause := likely_cause(index, cpus, regs, sregs, code, at):
        lines.append(f"  likely: {cause}")
    shown = code.hex(" ") if code else "unknown (nothing is mapped there)"
    lines.append(f"  rip {regs.rip:016x}  rflags {regs.rflags:08x}  bytes at rip: {shown}")
    for first in range(0, len(_GENERAL), 4):
        names = _GENERAL[first : first + 4]
        lines.append("  " + "  ".join(f"{name:<3} {getattr(regs, name):016x}" for name in names))
    lines.append(
        f"  cr0 {sregs.cr0:08x}  cr2 {sregs.cr2:016x}  cr3 {sregs.cr3:08x}  cr4 {sregs.cr4:08x}  "
        f"efer {sregs.efer:04x}"
    )
    lines.append(
        "  "
        + "  ".join(
            f"{name} {getattr(sregs, name).selector:04x}:{getattr(sregs, name).base:x}" for name in _SEGMENTS
        )
    )
    lines.append(
        f"  gdt {sregs.gdt.base:x}+{sregs.gdt.limit:x}  idt {sregs.idt.base:x}+{sregs.idt.limit:x}  "
        f"{_mode(regs, sregs)}"
    )
    return "\n".join(lines)


def say(reason: Exit) -> str:
    """An exit that ends a guest, in words."""
    match reason:
        case Shutdown():
            return "a triple fault (a fault that the guest had no handler for)"
        case InternalError(suberror, data):
            details = " ".join(f"{word:#x}" for word in data)
            what = _INTERNAL.get(suberror, "KVM could not go on")
            return f"{what} (internal error {suberror}{': ' + details if details else ''})"
        case FailEntry(number, cpu):
            return f"CPU {cpu} refused to enter the guest (hardware reason {number:#x})"
        case UnknownExit(number):
            return f"an exit that is not served here (reason {number})"
        case other:
            return f"an exit that is not served here ({other})"


def place(regs: kvm_regs, sregs: kvm_sregs) -> str:
    """Where a vCPU is, as people write it in its mode."""
    return f"{regs.rip:#x}" if sregs.cr0 & 1 else f"{sregs.cs.selector:04x}:{regs.rip:04x}"


def code_at(vcpu: Vcpu, memory: GuestMemory, offset: int, most: int, sregs: kvm_sregs) -> bytes | None:
    """Up to ``most`` bytes at ``offset`` of the code segment, as far as they lie in one page that is mapped
    and in RAM; None where not even the first one does.
    """
    linear = offset & _WORD if sregs.cs.l else (sregs.cs.base + offset) & 0xFFFFFFFF
    try:
        physical = vcpu.translate(linear)
    except KvmError:
        physical = None
    if physical is None:
        return None
    try:
        return memory.read(physical, min(most, PAGE_SIZE - physical % PAGE_SIZE))
    except ValueError:
        return None


def _mode(regs: kvm_regs, sregs: kvm_sregs) -> str:
    if not sregs.cr0 & 1:
        return "real mode"
    width = "64-bit" if sregs.cs.l else "32-bit" if sregs.cs.db else "16-bit"
    return f"{width} mode at level {sregs.cs.selector & 3}"
