"""A machine's life: every command in every state, against a table of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from kvmmig.errors import WrongState
from kvmmig.machine import Machine, MachineConfig, Program, State

pytestmark = pytest.mark.kvm

WaitUntil = Callable[[Callable[[], object]], Awaitable[None]]
SMALL = MachineConfig(memory=4 << 20, name="small")
C, R, P, M, E, X = State.CREATED, State.RUNNING, State.PAUSED, State.MOVED, State.ENDED, State.CLOSED

# Where each command leads from each state; None: it raises WrongState and changes nothing.
EXPECTED: dict[str, dict[State, State | None]] = {
    "load": {C: C, R: None, P: None, M: None, E: None, X: None},
    "apply": {C: P, R: None, P: None, M: None, E: None, X: None},
    "start": {C: R, R: R, P: R, M: None, E: None, X: None},
    "resume": {C: None, R: R, P: R, M: None, E: None, X: None},
    "force": {C: None, R: R, P: R, M: R, E: None, X: None},
    "pause": {C: None, R: P, P: P, M: None, E: None, X: None},
    "reset": {C: None, R: R, P: P, M: None, E: None, X: None},
    "capture": {C: None, R: None, P: P, M: None, E: None, X: None},
    "mark_moved": {C: None, R: None, P: M, M: M, E: None, X: None},
    "end": {C: E, R: E, P: E, M: E, E: E, X: X},
    "close": {C: X, R: X, P: X, M: X, E: X, X: X},
}


def counts_on(machine: Machine, before: bytes) -> Callable[[], bool]:
    """Has the quadword at 2 MiB left this value?"""
    return lambda: machine.memory.read(0x200000, 8) != before


async def bring(machine: Machine, program: Program, state: State) -> None:
    if state is C:
        return
    await machine.load(program)
    await machine.start()
    if state in (P, M):
        await machine.pause()
    if state is M:
        machine.mark_moved()
    if state is E:
        await machine.end()
    if state is X:
        await machine.aclose()
    assert machine.state is state


def command(machine: Machine, program: Program, name: str) -> Callable[[], Awaitable[object]]:
    async def apply() -> None:
        async with Machine.open(SMALL) as other:
            await other.load(program)
            await other.start()
            await other.pause()
            sections = await other.capture()
        await machine.apply(sections)

    async def mark_moved() -> None:
        machine.mark_moved()

    return {
        "load": lambda: machine.load(program),
        "apply": apply,
        "start": machine.start,
        "resume": machine.resume,
        "force": lambda: machine.resume(force=True),
        "pause": machine.pause,
        "reset": machine.reset,  # of one that has been loaded; see test_reset.py
        "capture": machine.capture,
        "mark_moved": mark_moved,
        "end": machine.end,
        "close": machine.aclose,
    }[name]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("before", list(State), ids=lambda state: state.name.lower())
async def test_each_command_leads_where_the_table_says(spinner: Program, name: str, before: State) -> None:
    after = EXPECTED[name][before]
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await bring(machine, spinner, before)
            call = command(machine, spinner, name)
            if after is None:
                with pytest.raises(WrongState, match="small"):
                    await call()
                assert machine.state is before
            else:
                await call()
                assert machine.state is after
        assert machine.state is X


async def test_a_refusal_names_the_state_and_what_would_be_right(spinner: Program) -> None:
    async with Machine.open(SMALL) as machine:
        await machine.load(spinner)
        await machine.start()
        with pytest.raises(WrongState) as caught:
            await machine.capture()
    assert str(caught.value) == (
        "can't capture 'small': the guest is running; that works only while it is paused"
    )


async def test_a_machine_that_moved_away_says_so(spinner: Program) -> None:
    async with Machine.open(SMALL) as machine:
        await bring(machine, spinner, M)
        with pytest.raises(WrongState, match="has moved away; resume it by force only if it does not run"):
            await machine.resume()


async def test_after_mark_moved_wait_returns_moved_and_by_force_it_runs_again(
    spinner: Program, wait_until: WaitUntil
) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await bring(machine, spinner, M)
            assert (await machine.wait()).kind == "moved"
            await machine.resume(force=True)
            before = machine.memory.read(0x200000, 8)
            await wait_until(counts_on(machine, before))
            with trio.move_on_after(0.01) as waiting:
                await machine.wait()
            assert waiting.cancelled_caught
            await machine.end()
            assert (await machine.wait()).kind == "ended"


async def test_wait_returns_when_another_task_stops_the_machine(spinner: Program) -> None:
    endings = []

    async def watch(machine: Machine) -> None:
        endings.append(await machine.wait())

    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine, trio.open_nursery() as nursery:
            await bring(machine, spinner, R)
            nursery.start_soon(watch, machine)
            nursery.start_soon(watch, machine)
            await trio.testing.wait_all_tasks_blocked()
            await machine.end()
    assert [ending.kind for ending in endings] == ["ended", "ended"]


async def test_a_guest_that_ends_itself_takes_the_machine_to_ended(quitter: Program) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(quitter)
            await machine.start()
            ending = await machine.wait()
            assert (ending.kind, ending.status, machine.state) == ("exit", 42, E)
            await machine.end()  # what the guest did itself stays
            assert await machine.wait() == ending


async def test_a_guest_that_has_ended_is_not_set_running_by_a_resume_that_came_too_late(
    long64: Callable[[str], Program],
) -> None:
    source = "out 0xf4, al; again: inc qword [0x200000]; jmp again"
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(long64(source))
            await machine.start()
            await machine.wait()
            machine._board.run()  # as `resume` does while the machine has not heard of the end
            for _ in range(50):
                await trio.to_thread.run_sync(lambda: None)
            await machine.end()
            assert machine.memory.read(0x200000, 8) == bytes(8)


async def test_pausing_a_guest_that_ends_meanwhile_says_that_it_has_ended(quitter: Program) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(quitter)
            await machine.start()
            while machine.vcpus[0].get_regs().rax != 42:  # waits for the vCPU to be out of the guest
                pass
            with pytest.raises(WrongState, match="the guest has ended"):
                await machine.pause()
            assert (await machine.wait()).status == 42


async def test_commands_at_the_same_time_are_carried_out_one_after_the_other(spinner: Program) -> None:
    async def toggle(machine: Machine) -> None:
        for _ in range(20):
            await machine.pause()
            await machine.resume()

    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await bring(machine, spinner, R)
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(toggle, machine)
            assert machine.state is R


async def test_a_cancelled_pause_leaves_a_state_that_is_true(spinner: Program, wait_until: WaitUntil) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await bring(machine, spinner, R)
            for _ in range(20):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await machine.pause()
                before = machine.memory.read(0x200000, 8)
                if machine.state is P:
                    await trio.to_thread.run_sync(lambda: None)
                    assert machine.memory.read(0x200000, 8) == before
                    await machine.resume()
                else:
                    assert machine.state is R
                    await wait_until(counts_on(machine, before))
