"""``dirtier`` on KVM: it works, it notices, and the host agrees with it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio

from kvmmig.guests import check, dirtier

if TYPE_CHECKING:
    from kvmmig.guests import Check
    from kvmmig.machine import GuestMemory
    from tests.guests.conftest import Move, Run, Running

pytestmark = pytest.mark.kvm

MIB = 1 << 20
TSC = 0x10  # IA32_TIME_STAMP_COUNTER


def host_check(running: Running) -> Check:
    config = running.machine.config
    outcome = check(
        config.name, running.machine.memory, cpus=config.cpus, parameters=running.program.parameters
    )
    assert outcome is not None
    return outcome


def progress(running: Running, vcpu: int = 0) -> int:
    """Hot pages that a vCPU has rewritten so far."""
    return int.from_bytes(running.machine.memory.read(dirtier.STATUS + 64 * vcpu + 24, 8), "little")


def poke(memory: GuestMemory, page: int, word: int) -> None:
    memory.view(page * 4096 + word * 8, 1)[0] ^= 1


async def until_progress(running: Running, more: int) -> None:
    goal = progress(running) + more
    while progress(running) < goal:  # noqa: ASYNC110 - guest memory that changes wakes nobody
        await trio.sleep(0.001)


async def test_it_passes_and_the_host_agrees(run: Run) -> None:
    async with run("dirtier", hot=4 * MIB) as running:
        await running.screen.until(lambda text: "C" in text)
        await running.machine.pause()
        outcome = host_check(running)
        assert outcome.ok
        assert outcome.faults == ()
        assert outcome.pages == (16 * MIB - dirtier.BOUNDARY) // 4096
        assert outcome.passes >= 3
        assert running.screen.text.startswith("ABC")


async def test_two_vcpus_share_the_work(run: Run) -> None:
    async with run("dirtier", cpus=2, hot=4 * MIB) as running:
        await running.screen.until(lambda text: "B" in text and "b" in text)
        await running.machine.pause()
        outcome = host_check(running)
        assert outcome.ok
        assert outcome.pages == (16 * MIB - dirtier.BOUNDARY) // 4096
        assert progress(running, 0) > 0
        assert progress(running, 1) > 0


async def test_the_shares_of_three_vcpus_cover_all_pages_though_they_do_not_divide_them(run: Run) -> None:
    async with run("dirtier", cpus=3, hot=4 * MIB + 4096, stride=2) as running:
        await running.screen.until(lambda text: "A" in text and "a" in text and "0" in text)
        await running.machine.pause()
        assert host_check(running).ok


async def test_the_memory_is_right_whenever_it_is_paused(run: Run) -> None:
    async with run("dirtier", cpus=2, hot=2 * MIB) as running:
        for _ in range(60):
            await running.machine.pause()
            outcome = host_check(running)
            assert outcome.ok, outcome.faults
            await running.machine.resume()


async def test_it_writes_to_hot_pages_its_status_and_its_stack_only(run: Run) -> None:
    async with run("dirtier", hot=1 * MIB, stride=3) as running:
        await running.screen.until(lambda text: "A" in text)
        await running.machine.pause()
        before = running.machine.memory.words.copy()
        await running.machine.resume()
        await until_progress(running, 1000)
        await running.machine.pause()
        written = np.flatnonzero((before != running.machine.memory.words).any(axis=1))
        hot = range(512, 512 + 3 * 256, 3)
        assert set(hot) < set(written.tolist())
        stack = running.machine.vcpus[0].get_regs().rsp // 4096
        others = set(written.tolist()) - set(hot) - {stack, stack - 1}
        assert others == {dirtier.STATUS // 4096}


@pytest.mark.parametrize(("cpus", "vcpu"), [(1, 0), (2, 1)])
async def test_a_wrong_byte_is_found_by_the_guest_and_by_the_host(run: Run, cpus: int, vcpu: int) -> None:
    async with run("dirtier", cpus=cpus, hot=1 * MIB) as running:
        # All vCPUs have filled their pages: what is poked before that would be filled again.
        await running.screen.until(lambda text: all(letter in text for letter in "Aa"[:cpus]))
        await running.machine.pause()
        page = running.machine.memory.n_pages - 1  # the last one: a cold page of the last vCPU
        poke(running.machine.memory, page, 17)
        outcome = host_check(running)
        assert not outcome.ok
        where = f"vcpu {vcpu} page {page:#x} word 17: expected 0x"
        assert [fault.startswith(where) for fault in outcome.faults] == [True]

        await running.machine.resume()
        ending = await running.machine.wait()
        assert (ending.kind, ending.status) == ("exit", 1)
        assert re.search(rf"\nFAIL dirtier: {where}[0-9a-f]+, found 0x[0-9a-f]+\n$", running.screen.text)
        assert running.screen.text.rpartition("FAIL dirtier: ")[2].strip() == outcome.faults[0]
        assert f"vcpu {vcpu} has itself found 1 wrong" in host_check(running).faults


async def test_a_hot_page_that_was_lost_is_found(run: Run) -> None:
    async with run("dirtier", hot=1 * MIB) as running:
        await until_progress(running, 2000)
        await running.machine.pause()
        hot = 256
        busy = progress(running) % hot
        lost = (busy + hot // 2) % hot
        running.machine.memory.words[512 + lost] = 0
        outcome = host_check(running)
        assert not outcome.ok
        assert outcome.pages == running.machine.memory.n_pages - 512 - 1
        assert f"vcpu 0 page {512 + lost:#x} word 0: " in outcome.summary
        await running.machine.resume()
        assert (await running.machine.wait()).status == 1
        assert f"FAIL dirtier: vcpu 0 page {512 + lost:#x} word 0: expected 0x" in running.screen.text
        assert ", found 0x0\n" in running.screen.text


async def test_without_a_hot_set_it_only_reads(run: Run) -> None:
    async with run("dirtier", hot=0) as running:
        await running.screen.until(lambda text: "B" in text)
        await running.machine.pause()
        assert host_check(running).ok
        assert progress(running) == 0


async def test_it_goes_on_in_another_machine(run: Run, move: Move) -> None:
    async with run("dirtier", cpus=2, hot=4 * MIB) as running:
        await until_progress(running, 2000)
        await running.machine.pause()
        before = host_check(running)
        assert before.ok
        async with move(running) as moved:
            assert progress(moved) >= progress(running)
            await until_progress(moved, 5000)
            await moved.machine.pause()
            assert host_check(moved).ok
            assert "FAIL" not in moved.screen.text


@pytest.mark.parametrize("jump", [-(1 << 44), 1 << 44], ids=["forward", "back"])
async def test_a_paced_dirtier_survives_a_jump_of_its_clock(run: Run, jump: int) -> None:
    async with run("dirtier", hot=1 * MIB, pace=2000) as running:
        await until_progress(running, 10)
        await running.machine.pause()
        # Not every KVM lets the TSC be set; to move the time that the next page is due comes to the same.
        vcpu = running.machine.vcpus[0]
        regs = vcpu.get_regs()
        regs.r9 += jump
        vcpu.set_regs(regs)
        await running.machine.resume()
        await until_progress(running, 100)
        await running.machine.pause()
        late = vcpu.get_msrs([TSC])[TSC] - vcpu.get_regs().r9
        assert abs(late) < 1 << 40
        assert host_check(running).ok


@pytest.mark.parametrize("memory", [16 * MIB, 256 * MIB])
async def test_a_pace_holds_whatever_the_memory(run: Run, memory: int) -> None:
    async with run("dirtier", memory=memory, hot=1 * MIB, pace=2000) as running:
        await until_progress(running, 1)
        await running.machine.pause()
        vcpu = running.machine.vcpus[0]
        period, pages, due = vcpu.get_regs().r8, progress(running), vcpu.get_regs().r9
        assert period == vcpu.get_tsc_khz() * 1000 // 2000
        await running.machine.resume()
        await until_progress(running, 600)  # more than two laps: the cold pages are verified meanwhile
        await running.machine.pause()
        # Each page has had its slot, and each slot its page.
        slots = (vcpu.get_regs().r9 - due) // period
        assert abs(slots - (progress(running) - pages)) <= 1


@pytest.mark.parametrize("pattern", ["random", "zipf"])
async def test_in_every_pattern_it_passes_and_a_lost_page_is_found(run: Run, pattern: str) -> None:
    async with run("dirtier", cpus=2, hot=1 * MIB + 3 * 4096, stride=2, pattern=pattern) as running:
        await running.screen.until(lambda text: "B" in text and "b" in text)
        for _ in range(5):
            await running.machine.pause()
            outcome = host_check(running)
            assert outcome.ok, outcome.faults
            await running.machine.resume()
        await running.machine.pause()
        running.machine.memory.words[512] = 0  # page 0 of the first vCPU: whose turn may be just now
        running.machine.memory.words[516] = 0
        assert not host_check(running).ok
        await running.machine.resume()
        assert (await running.machine.wait()).status == 1


@pytest.mark.slow
async def test_memory_beyond_the_hole_below_4_gib_is_used(run: Run) -> None:
    memory = (4 << 30) + 256 * MIB
    async with run("dirtier", memory=memory, cpus=2, hot=64 * MIB, stride=8) as running:
        await running.screen.until(lambda text: "A" in text and "a" in text)
        await running.machine.pause()
        outcome = await trio.to_thread.run_sync(host_check, running)
        assert outcome.ok
        assert outcome.pages == (memory - dirtier.BOUNDARY) // 4096
        last = running.machine.memory.regions[-1]
        page = (last.gpa + last.size) // 4096 - 1
        poke(running.machine.memory, page, 511)
        await running.machine.resume()
        assert (await running.machine.wait()).status == 1
        assert f"FAIL dirtier: vcpu 1 page {page:#x} word 511: " in running.screen.text
