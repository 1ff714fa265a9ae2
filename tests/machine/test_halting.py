"""Guests that can do nothing any more, and those that only seem so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from kvmmig.machine import Ending, Machine, MachineConfig, Program

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Program]


async def ending_of(program: Program, *, cpus: int = 1) -> Ending:
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=4 << 20, cpus=cpus)) as machine:
            await machine.load(program)
            await machine.start()
            return await machine.wait()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("cli; hlt", "it has halted before 0000:7c02 with interrupts off, so nothing can wake it"),
        ("jmp $", "it goes round for ever at 0000:7c00, and no interrupt leads out of there"),
        ("again: hlt; jmp again", "and no interrupt leads out of there"),
        ("cli; again: pause; jmp again", "it goes round for ever at 0000:7c0"),
    ],
)
async def test_a_guest_that_can_do_nothing_has_ended(real16: Assemble, source: str, says: str) -> None:
    ending = await ending_of(real16(source))
    assert ending.kind == "halted"
    assert says in ending.report


async def test_a_guest_that_goes_round_for_ever_has_ended_when_every_vcpu_does(
    long64: Assemble,
) -> None:
    ending = await ending_of(long64("jmp $"), cpus=2)
    assert ending.kind == "halted"
    assert "it goes round for ever at 0x100000" in ending.report


# The guest's own handler of the timer's interrupt counts to 20, which takes a second, and ends it.
OWN_TIMER = """
    xor ax, ax
    mov ds, ax
    cli
    mov word [0x1c * 4], tick
    mov word [0x1c * 4 + 2], 0
    sti
    again: hlt
    jmp again
    tick: inc byte [0x9000]
    cmp byte [0x9000], 20
    jb not_yet
    mov al, 9
    out 0xf4, al
    not_yet: iret
"""


async def test_a_guest_that_waits_for_its_own_timer_goes_on(real16: Assemble) -> None:
    assert await ending_of(real16(OWN_TIMER)) == Ending("exit", 9)


async def test_one_vcpu_may_wait_for_another(long64: Assemble) -> None:
    # The first one goes round for ever; the second counts its TSC for a while, and ends the guest.
    source = """
        test edi, edi
        jz for_ever
        imul rcx, rcx, 800
        rdtsc
        shl rdx, 32
        lea rbx, [rax + rdx]
        add rbx, rcx
        wait_on: rdtsc
        shl rdx, 32
        or rax, rdx
        cmp rax, rbx
        jb wait_on
        mov al, 4
        out 0xf4, al
        for_ever: jmp for_ever
    """
    assert await ending_of(long64(source), cpus=2) == Ending("exit", 4)


CAUSES = {
    "hlt": "hlt is not allowed at privilege level 3, where a 64-bit guest runs; a guest ends by writing",
    "cli": "cli is not allowed at privilege level 3",
    "mov rax, cr0": "mov rax, cr0 is not allowed at privilege level 3",
    "int 0x80": "int 0x80 calls an operating system, and there is none here",
    "syscall": "an operating system, and there is none here",
    "xor ebx, ebx; mov rax, [rbx + 8]": "it used a null pointer, or one nearly null: the address 0x8",
    "call $": "its stack ran over: it has 276 KiB, from 0x19000 to 0x5e000",
    "ud2": "ud2 is what compilers put where a program must never come",
    "xor ecx, ecx; div ecx": "a division by zero",
    "nop; times 32 db 0": "it ran on past its last instruction",
    "mov rax, 0x7000000000; jmp rax": "it jumped to 0x7000000000, where nothing is mapped",
    "mov rax, [0x7f000000]": "it used the address 0x7f000000, which is outside its memory",
    "movaps xmm0, [rsp - 4]": "movaps wants an address that is a multiple of 16",
}


@pytest.mark.parametrize("source", CAUSES)
async def test_a_crash_report_has_the_instruction_and_the_likely_cause(long64: Assemble, source: str) -> None:
    ending = await ending_of(long64(source))
    assert ending.kind == "crash"
    _, at, likely, *_ = ending.report.splitlines()
    assert at.startswith("  at 0x")
    assert likely.startswith("  likely: ")
    assert CAUSES[source] in likely


async def test_a_vcpu_s_stack_is_told_as_its_own(long64: Assemble) -> None:
    ending = await ending_of(long64("test edi, edi; jz $; call $"), cpus=2)
    assert "it has 136 KiB, from 0x3c000 to 0x5e000" in ending.report
