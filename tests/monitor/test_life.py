"""The life of a machine under control is a table, and the code runs on it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from kvmmig.errors import WrongState
from kvmmig.monitor.life import COMMANDS, EVENTS, Life, LifeState

E, X, L, A = LifeState.EMPTY, LifeState.EXPECTING, LifeState.LOADING, LifeState.AWAITING
P, N, H, R = LifeState.OPENING, LifeState.LISTENING, LifeState.HERE, LifeState.RESETTING
M, S = LifeState.MIGRATING, LifeState.SWITCHING_OVER

# Where a command is allowed, and where it leads; it is refused everywhere else.
ALLOWED: dict[str, dict[LifeState, LifeState]] = {
    "load": {E: L, X: L, A: L},
    "adopt": {E: H, X: H, A: H},
    "defer": {E: A, X: A, A: A},
    "listen": {E: P, X: P, A: P},
    "pause": {H: H, R: R, M: M},
    "resume": {H: H, R: R, M: M},
    "reset": {H: R},
    "migrate": {H: M},
    "measure": {H: H},
    "take back": {H: H},
}
WAYS: dict[LifeState, list[str]] = {
    E: [],
    L: ["load"],
    A: ["defer"],
    P: ["listen"],
    N: ["listen", "listens"],
    H: ["load", "loaded"],
    R: ["load", "loaded", "reset"],
    M: ["adopt", "migrate"],
    S: ["listen", "listens", "arrived", "migrate", "switchover"],
}


def life_in(state: LifeState) -> Life:
    life = Life("a", guest_follows=state is X)
    for step in WAYS.get(state, []):
        (life.enter if step in COMMANDS else life.happened)(step)
    assert life.state is state
    return life


def test_the_table_says_something_of_each_command_in_each_state() -> None:
    assert set(COMMANDS) == set(ALLOWED)
    for command, row in COMMANDS.items():
        assert set(row) == set(LifeState), command


@pytest.mark.parametrize("state", LifeState, ids=lambda state: state.name.lower())
@pytest.mark.parametrize("command", ALLOWED)
async def test_a_command_leads_where_it_should_or_is_refused_in_a_sentence(
    command: str, state: LifeState
) -> None:
    life = life_in(state)
    after = ALLOWED[command].get(state)
    if after is not None:
        life.enter(command)
        assert life.state is after
    else:
        with pytest.raises(WrongState) as caught:
            life.enter(command)
        assert life.state is state
        assert "{" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        (L, "not loaded", E),
        (P, "not arrived", A),
        (N, "not arrived", A),
        (R, "reset is over", H),
        (M, "migration is over", H),
        (S, "migration is over", H),
    ],
)
async def test_whatever_fails_or_ends_leaves_a_state_in_which_it_can_be_begun_again(
    state: LifeState, event: str, after: LifeState
) -> None:
    life = life_in(state)
    life.happened(event)
    assert life.state is after


async def test_each_state_can_be_left_but_where_all_begins_and_ends() -> None:
    for state in LifeState:
        leads = [row[state] for row in COMMANDS.values() if isinstance(row[state], LifeState)]
        leads += [row[state] for row in EVENTS.values() if state in row]
        assert any(after is not state for after in leads), state


@pytest.mark.parametrize("state", [X, L, P])
async def test_what_needs_the_guest_waits_while_it_is_about_to_be_there(state: LifeState) -> None:
    life = life_in(state)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.settled)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        if state is X:
            life.enter("load")
            await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks, "it is being loaded"
        life.happened({X: "loaded", L: "not loaded", P: "listens"}[state])
    with trio.fail_after(60):
        await life.settled()
