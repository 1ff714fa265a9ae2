"""What a crashed guest was about to do, and the likely cause: for who sees registers for the first time.

The instruction is decoded by capstone. A cause is a guess from what is there to be seen after the fault;
where none fits none is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmmig.kvm.abi import kvm_regs, kvm_sregs
from kvmmig.machine import boot
from kvmmig.machine.memory import PAGE_SIZE
from kvmmig.units import format_size

_LEVEL_0_ONLY = frozenset(
    (
        *("hlt", "cli", "sti", "lgdt", "lidt", "lldt", "ltr", "lmsw", "clts", "invd", "wbinvd", "invlpg"),
        *("rdmsr", "wrmsr", "swapgs", "iretq", "sysret", "sysexit"),
    )
)
_CALLS_OF_A_SYSTEM = frozenset(("int", "int1", "int3", "into", "syscall", "sysenter"))
_DIVISIONS = frozenset(("div", "idiv"))
_ALIGNED = frozenset(["movaps", "movapd", "movdqa", "movntdq", "movntps", "movntpd", "fxsave", "fxrstor"])
_INTERRUPTS_ON = 1 << 9
_OSXSAVE = 1 << 18


@dataclass(frozen=True, slots=True)
class Instruction:
    """A decoded one: ``mov`` and ``rax, qword ptr [rbx]``."""

    mnemonic: str
    operands: str

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".strip()


def decode(code: bytes, address: int, sregs: kvm_sregs) -> Instruction | None:
    """The instruction that ``code`` begins with; None where it begins with none."""
    import capstone  # only here: a guest that does not crash needs none of it

    mode = capstone.CS_MODE_16
    if sregs.cr0 & 1:
        mode = capstone.CS_MODE_64 if sregs.cs.l else capstone.CS_MODE_32 if sregs.cs.db else mode
    found = next(capstone.Cs(capstone.CS_ARCH_X86, mode).disasm_lite(code, address, 1), None)
    return None if found is None else Instruction(found[2], found[3])


def likely_cause(
    index: int, cpus: int, regs: kvm_regs, sregs: kvm_sregs, code: bytes | None, at: Instruction | None
) -> str | None:
    """Why vCPU ``index`` of ``cpus`` has crashed, in one or two sentences.

    ``code`` is what lies at rip, None where nothing is mapped there; ``at`` is the instruction.
    """
    if not sregs.cr0 & 1:
        return None
    if not sregs.cs.l:
        return _without_long_mode(regs, sregs)
    if sregs.cs.selector & 3 and not sregs.idt.limit:
        return _in_the_64_bit_environment(index, cpus, regs, sregs, code, at)
    return None


def _without_long_mode(regs: kvm_regs, sregs: kvm_sregs) -> str | None:
    if sregs.idt.base == 0 and regs.rflags & _INTERRUPTS_ON:
        return (
            "it is in protected mode with interrupts on, and has loaded no interrupt table (lidt), so the "
            "timer's first tick is a fault; say cli before the switch"
        )
    if sregs.idt.base == 0:
        return (
            "any fault ends a guest in protected mode that has loaded no interrupt table (lidt); look at the "
            "instruction, and at the segments that its GDT describes"
        )
    return None


def _in_the_64_bit_environment(
    index: int, cpus: int, regs: kvm_regs, sregs: kvm_sregs, code: bytes | None, at: Instruction | None
) -> str | None:
    guard, size = boot.stack_guard(index, cpus), boot.stack_size(cpus)
    if any(guard <= address < guard + PAGE_SIZE for address in (sregs.cr2, regs.rsp - 8, regs.rsp)):
        return (
            f"its stack ran over: it has {format_size(size)}, from {guard + PAGE_SIZE:#x} to "
            f"{guard + PAGE_SIZE + size:#x}, and nothing is mapped below; does something call itself "
            "without end?"
        )
    if code is None and not regs.rip:
        return (
            "it jumped to address 0: by a function's pointer that is null, or by syscall, which calls an "
            "operating system, and there is none here"
        )
    if code is None:
        return (
            f"it jumped to {regs.rip:#x}, where nothing is mapped: was a function's pointer, or its stack, "
            "overwritten?"
        )
    if at is None:
        return "there is no instruction: it ran into data"
    if at.mnemonic == "hlt":
        return (
            "hlt is not allowed at privilege level 3, where a 64-bit guest runs; a guest ends by writing its "
            "exit status to port 0xf4: mov al, 0 and out 0xf4, al"
        )
    if at.mnemonic in _LEVEL_0_ONLY or (at.mnemonic == "mov" and _names_a_control_register(at)):
        return (
            f"{at} is not allowed at privilege level 3, where a 64-bit guest runs; what needs level 0 "
            "starts in real mode"
        )
    if at.mnemonic in _CALLS_OF_A_SYSTEM:
        return (
            f"{at} calls an operating system, and there is none here: print to the serial port (0x3f8), and "
            "end by a write to port 0xf4"
        )
    if at.mnemonic.startswith("ud"):
        return (
            f"{at.mnemonic} is what compilers put where a program must never come: a panic, or the end of a "
            "function that does not return"
        )
    if code[:2] == b"\0\0":
        return "there are only zeros: it ran on past its last instruction; end it by a write to port 0xf4"
    if at.mnemonic in _DIVISIONS:
        return "a division by zero, or one whose result has no room"
    if at.mnemonic in _ALIGNED:
        return (
            f"{at.mnemonic} wants an address that is a multiple of 16; is the stack aligned as the compiler "
            "expects?"
        )
    if at.mnemonic.startswith("v") and not sregs.cr4 & _OSXSAVE:
        return "AVX is off here; compile with -mno-avx"
    if "[" in at.operands and sregs.cr2 < PAGE_SIZE:
        return f"it used a null pointer, or one nearly null: the address {sregs.cr2:#x}"
    if sregs.cr2:
        return f"it used the address {sregs.cr2:#x}, which is outside its memory"
    return None


def _names_a_control_register(at: Instruction) -> bool:
    return any(operand.strip()[:2] in ("cr", "dr") for operand in at.operands.split(","))
