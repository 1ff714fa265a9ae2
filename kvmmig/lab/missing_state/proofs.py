"""What proves each piece of state: the table that ``docs/state.md`` shows."""

from __future__ import annotations

from kvmmig.kvm import abi
from kvmmig.lab.missing_state import acts
from kvmmig.lab.missing_state.acts import fields, in_chip, msr, span
from kvmmig.lab.missing_state.proof import Proof

_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rflags"),
)
_BREAKPOINTS = ("DR0", "DR1", "DR2", "DR3", "DR7")
# The numbers in msrs.asm
_MSRS = (
    *(0x174, 0x175, 0x176),
    *(0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102),
    *(0x277, 0x1A0, 0x3B),
)
#: Two numbers of one thing: where the older and the newer interface of kvmclock have its page.
SYSTEM_TIME = (0x12, 0x4B564D01)

#: Guests that notice.
PROOFS = (
    Proof(
        section="cpu/regs",
        guest="regs",
        says="a known value in every general register, and the direction flag",
        parts={"all but rip": acts.all_but_rip} | fields(abi.kvm_regs, *_REGISTERS),
    ),
    Proof(
        section="cpu/sregs",
        guest="sregs",
        says="segments, GDT, IDT, CR0, CR2, CR3, CR4, EFER and the APIC's mode, none at its default",
        parts=fields(
            *(abi.kvm_sregs, "es", "fs", "gs", "gdt", "idt", "cr0", "cr2", "cr3", "cr4", "efer", "apic_base")
        ),
    ),
    Proof(
        section="cpu/xsave",
        guest="xsave",
        says="values in x87, SSE and AVX registers, rounding modes in both control words",
        prepare=acts.switch_avx_on,
        # Intel SDM vol. 1, 13.4: the legacy area, and behind the header the upper halves of ymm0-15
        parts={
            "x87": span(0, 6, 32, 160),
            "x87 control": span(0, 2),
            "SSE": span(160, 416),
            "MXCSR": span(24, 28),
            "AVX": span(576, 832),
        },
    ),
    Proof(
        section="cpu/debugregs",
        guest="debugregs",
        says="four breakpoint addresses in DR0 to DR3, and their switches in DR7",
        # struct kvm_debugregs: four quadwords, DR6, DR7
        parts={name: span(at, at + 8) for name, at in zip(_BREAKPOINTS, (0, 8, 16, 24, 40), strict=True)},
    ),
    Proof(
        section="cpu/lapic",
        guest="lapic",
        says="a periodic timer interrupt that goes on, by the guest's vector",
        # Intel SDM vol. 3, table 11-1
        parts={"SVR": span(0xF0, 0xF4), "LVT timer": span(0x320, 0x324), "initial count": span(0x380, 0x384)},
    ),
    Proof(
        section="cpu/msrs",
        guest="msrs",
        says="SYSENTER_*, STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, PAT, MISC_ENABLE, TSC_ADJUST, "
        "kvmclock's page: each alone is missed",
        parts={f"{index:#x}": msr(index) for index in _MSRS} | {"kvmclock": msr(*SYSTEM_TIME)},
    ),
    Proof(
        section="cpu/msrs",
        guest="tsc",
        says="the TSC never goes back",
        prepare=acts.set_tsc_far_ahead,
        parts={"TSC": msr(acts.TSC)},
        why_not=acts.why_no_tsc,
    ),
    Proof(
        section="cpu/tsc-deadline",
        guest="tsc-deadline",
        says="a timer that was set to a moment of the TSC fires at it",
        build=acts.offer_tsc_deadline,
    ),
    Proof(
        section="cpu/events",
        guest="events",
        says="moves inside its NMI handler while a second NMI is pending, which comes when the first ends",
        # struct kvm_vcpu_events: the exception has 8 bytes, the interrupt 4, and then comes the NMI
        parts={"NMI pending": span(13, 14), "NMI masked": span(14, 15)},
    ),
    Proof(
        section="cpu/mp-state",
        guest="mp-state",
        says="is halted, and goes on only when an interrupt comes",
        prepare=acts.lead_pin,
        finish=acts.interrupt_when_halted,
    ),
    Proof(
        section="vm/pit",
        guest="pit",
        says="channel 0 goes on ticking at the guest's rate",
    ),
    Proof(
        section="vm/clock",
        guest="clock",
        says="kvmclock, 11 days ahead of a fresh one, never goes back",
        prepare=acts.set_kvmclock_far_ahead,
    ),
    Proof(
        section="vm/wall-clock",
        guest="wall-clock",
        says="the time of the guest's boot, which KVM writes into its memory, stays what it was",
        prepare=acts.set_kvmclock_far_ahead,
    ),
    Proof(
        section="vm/pic-master",
        guest="pic-master",
        says="an interrupt that waits in it is delivered, by the guest's vector; its mask reads back",
        stopped=acts.raise_line(5),
        parts=in_chip("irr") | in_chip("imr") | in_chip("irq_base"),
    ),
    Proof(
        section="vm/pic-slave",
        guest="pic-slave",
        says="an interrupt that waits in it is delivered, by the guest's vector; its mask reads back",
        stopped=acts.raise_line(11),
        parts=in_chip("irr") | in_chip("imr") | in_chip("irq_base"),
    ),
    Proof(
        section="vm/ioapic",
        guest="ioapic",
        says="an interrupt that comes after the move takes the way that the guest chose",
        prepare=acts.lead_pin,
        finish=acts.interrupt,
    ),
    Proof(
        section="dev/serial",
        guest="serial",
        says="IER, FCR, LCR, MCR, SCR, divisor; 16 bytes in the FIFO and 24 behind it, in order",
        stopped=acts.type_forty_bytes,
        parts={name: span(at, at + 1) for at, name in enumerate(("IER", "FCR", "LCR", "MCR", "SCR"))}
        | {"divisor": span(7, 9), "bytes in flight": acts.no_bytes_in_flight},
    ),
    Proof(
        section="dev/system-control",
        guest="system-control",
        says="A20, switched on through port 0x92, reads back",
    ),
)

#: Sections that a guest can't see on every KVM: the host writes something there, and reads it after the move.
HOST_PROOFS = {
    "cpu/tsc-khz": (acts.double_tsc_khz, "a frequency unlike the description's"),
    "cpu/xcrs": (acts.leave_avx_off, "XCR0 with x87 and SSE alone"),
}
