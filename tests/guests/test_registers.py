"""``registers`` runs, survives being paused and moved, and notices each kind of register that changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvmmig.kvm import Vcpu
    from kvmmig.machine import Machine
    from tests.guests.conftest import Move, Run

pytestmark = pytest.mark.kvm

GENERAL = ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16))]
FLAGS = {"carry": 0, "parity": 2, "adjust": 4, "zero": 6, "sign": 7, "direction": 10, "overflow": 11}
PAUSE = b"\xf3\x90"  # only in the guest's window, where all of its values are live

# Words of the XSAVE area (Intel SDM volume 1, section 13.4): its legacy part, and where CPUs put the upper
# halves of the ymm registers.
FCW, MXCSR, XMM, YMM = 0, 6, 40, 144

Change = Callable[["Vcpu"], None]


async def pause_in_window(machine: Machine, vcpu: int = 0) -> None:
    """Pause with all values of a vCPU live."""
    await machine.pause()
    while machine.memory.read(machine.vcpus[vcpu].get_regs().rip, 2) != PAUSE:
        await machine.resume()
        await machine.pause()


def general(name: str) -> Change:
    def change(vcpu: Vcpu) -> None:
        regs = vcpu.get_regs()
        setattr(regs, name, getattr(regs, name) ^ 1 << 63)
        vcpu.set_regs(regs)

    return change


def flag(bit: int) -> Change:
    def change(vcpu: Vcpu) -> None:
        regs = vcpu.get_regs()
        regs.rflags ^= 1 << bit
        vcpu.set_regs(regs)

    return change


def extended(word: int, bit: int) -> Change:
    def change(vcpu: Vcpu) -> None:
        xsave = vcpu.get_xsave()
        xsave.region[word] ^= 1 << bit
        vcpu.set_xsave(xsave)

    return change


CHANGES = [
    *(pytest.param(general(name), name, id=name) for name in GENERAL),
    *(pytest.param(flag(bit), "flags", id=name) for name, bit in FLAGS.items()),
    *(pytest.param(extended(XMM + 4 * n + n % 4, 31), f"xmm{n}", id=f"xmm{n}") for n in range(16)),
    *(pytest.param(extended(YMM + 4 * n + n % 4, 0), f"ymm{n}", id=f"ymm{n}") for n in range(16)),
    pytest.param(extended(FCW, 10), "x87 control word", id="x87"),
    pytest.param(extended(MXCSR, 15), "mxcsr", id="mxcsr"),
]


def enable_avx(machine: Machine) -> None:
    """As a machine does where KVM says that it supports AVX; some KVMs have it and do not say so."""
    cr4_osxsave, avx = 1 << 18, 0b111
    for vcpu in machine.vcpus:
        (features,) = [entry.ecx for entry in vcpu.get_cpuid2() if entry.function == 1]
        if not features >> 28 & 1:
            pytest.skip("this host has no AVX")
        sregs = vcpu.get_sregs()
        sregs.cr4 |= cr4_osxsave
        vcpu.set_sregs(sregs)
        xcrs = vcpu.get_xcrs()
        xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, xcrs.xcrs[0].value | avx
        vcpu.set_xcrs(xcrs)


@pytest.mark.parametrize(("change", "name"), CHANGES)
async def test_a_change_is_noticed(run: Run, change: Change, name: str) -> None:
    before_start = enable_avx if name.startswith("ymm") else None
    async with run("registers", before_start=before_start) as running:
        await pause_in_window(running.machine)
        change(running.machine.vcpus[0])
        await running.machine.resume()
        ending = await running.machine.wait()
        assert (ending.kind, ending.status) == ("exit", 1)
        line = rf"FAIL registers: {name} changed on vcpu 0x0: expected 0x[0-9a-f]+, found 0x[0-9a-f]+\n"
        assert re.fullmatch(rf"r*\n{line}", running.screen.text)


async def test_a_change_on_the_second_vcpu_is_told_as_such(run: Run) -> None:
    async with run("registers", cpus=2) as running:
        await pause_in_window(running.machine, 1)
        general("rbx")(running.machine.vcpus[1])
        await running.machine.resume()
        await running.machine.wait()
        assert "\nFAIL registers: rbx changed on vcpu 0x1: expected 0x" in running.screen.text


async def test_nothing_changes_when_it_is_paused_many_times(run: Run) -> None:
    async with run("registers", cpus=2, rounds=100) as running:
        for _ in range(200):
            await running.machine.pause()
            await running.machine.resume()
        printed = len(running.screen.text)
        await running.screen.until(lambda text: len(text) > printed + 2)
        assert set(running.screen.text) == {"r"}


async def test_all_values_are_there_in_another_machine(run: Run, move: Move) -> None:
    async with run("registers", cpus=2, rounds=100, before_start=enable_avx) as running:
        await running.screen.until(lambda text: len(text) > 2)
        await pause_in_window(running.machine)
        async with move(running) as moved:
            await moved.screen.until(lambda text: len(text) > 4)
            assert set(moved.screen.text) == {"r"}
