"""A transport that somebody else wrote may do anything: never two sides run, and the sentence names it.

Both machines are real. The transport is in memory; one of its two channels misbehaves in one method, from one
moment on.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from kvmmig.errors import KvmmigError, OutcomeUnknown
from kvmmig.machine import Entry, Machine, MachineConfig, Program, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.testing import MemoryTransport
from kvmmig.transport import (
    AnyChannel,
    Channel,
    Listener,
    PassingChannel,
    Side,
    TransportURI,
    guard,
    on_phase,
    register,
    transport_for,
)

pytestmark = pytest.mark.kvm

SPINNER = Program("spinner", Entry.LONG64, b"\xeb\xfe")
CONFIG = MachineConfig(memory=2 << 20, on_halt="stay")  # its guest does nothing on purpose
QUICK = Limits(connect_timeout=0.3, setup_timeout=0.3, stall_timeout=0.3, handover_timeout=0.3)
NAMES = map(str, itertools.count())

Slip = Callable[[int], Awaitable[object]]


async def too_many(offered: int) -> object:
    await trio.lowlevel.checkpoint()
    return offered + 1


async def less_than_nothing(offered: int) -> object:
    await trio.lowlevel.checkpoint()
    return -1


async def no_number(offered: int) -> object:
    await trio.lowlevel.checkpoint()
    return None


async def no_checkpoint(offered: int) -> object:
    return 1


async def value_error(offered: int) -> object:
    await trio.lowlevel.checkpoint()
    raise ValueError("a slip")


async def system_exit(offered: int) -> object:
    raise SystemExit(3)


async def ctrl_c(offered: int) -> object:
    raise KeyboardInterrupt


async def generator_exit(offered: int) -> object:
    raise GeneratorExit


async def group(offered: int) -> object:
    raise BaseExceptionGroup("several", [ValueError("a slip"), SystemExit(3)])


async def never(offered: int) -> object:
    await trio.sleep_forever()


async def not_even_when_cancelled(offered: int) -> object:
    with trio.CancelScope(shield=True) as scope:
        STRAYS.append(scope)
        await trio.sleep_forever()
    return 1


STRAYS: list[trio.CancelScope] = []  # so that the test's own end does not wait for them


@dataclass
class Plan:
    """Which side, which method, from which of a migration's phases or which call on, and what it does."""

    side: Side
    method: str
    when: str | int
    slip: Slip


PLAN: Plan | None = None


class BadChannel(PassingChannel):
    def __init__(self, below: AnyChannel, plan: Plan) -> None:
        super().__init__(below)
        self._plan = plan
        self._calls = 0
        self._bad = False

        def enters(phase: str) -> None:
            self._bad |= phase == plan.when

        on_phase(enters)

    def _slips(self, method: str) -> bool:
        if method != self._plan.method and self._plan.method not in ("background", "exit"):
            return False
        self._calls += 1
        self._bad |= self._calls == self._plan.when
        return self._bad and method == self._plan.method

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        if self._slips("send_some"):
            return await self._plan.slip(sum(map(len, buffers)))  # type: ignore[return-value]  # a slip
        return await super().send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        if self._slips("receive_some"):
            return await self._plan.slip(len(buffer))  # type: ignore[return-value]  # a slip
        return await super().receive_some(buffer)

    async def flush(self) -> None:
        if self._slips("flush"):
            await self._plan.slip(0)
        await super().flush()

    async def aclose(self) -> None:
        if self._slips("aclose"):
            await self._plan.slip(0)
        await super().aclose()

    def abort(self) -> None:
        super().abort()
        if self._slips("abort"):
            raise SystemExit(4)


class BadTransport(MemoryTransport):
    """``bad:NAME``: as in memory, but for the side that `PLAN` names."""

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        async with super().connect() as channel, spoilt(channel, Side.SOURCE) as bad:
            yield bad

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with super().listen() as listener:
            yield BadListener(listener)


class BadListener(Listener):
    def __init__(self, inner: Listener) -> None:
        self.uri = inner.uri
        self._inner = inner

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        async with self._inner.accept() as channel, spoilt(channel, Side.DESTINATION) as bad:
            yield bad


@asynccontextmanager
async def spoilt(channel: AnyChannel, side: Side) -> AsyncIterator[Channel]:
    assert PLAN is not None
    plan = PLAN if side is PLAN.side else Plan(side, "none", 0, never)
    async with trio.open_nursery() as nursery:
        bad = BadChannel(channel, plan)

        async def fail_behind_its_back() -> None:
            while not bad._bad:
                await trio.lowlevel.checkpoint()
            await plan.slip(0)

        if plan.method == "background":
            nursery.start_soon(fail_behind_its_back)
        yield bad
        if plan.method == "exit":
            await plan.slip(0)
        nursery.cancel_scope.cancel()


@dataclass
class Outcome:
    """Who runs when both sides have come to their end, and what they were told."""

    source: State = State.CREATED
    begun: bool = False  # at the destination
    arrived: bool = False
    errors: tuple[KvmmigError, ...] = ()

    @property
    def unknown(self) -> bool:
        return any(isinstance(error, OutcomeUnknown) for error in self.errors)


async def move(plan: Plan, around: str = "") -> Outcome:
    global PLAN
    PLAN, outcome, errors = plan, Outcome(), list[KvmmigError]()
    # What never returns is waited for; whatever else happens, happens soon, but on a busy host not very soon.
    waits = plan.slip in (never, not_even_when_cancelled, no_checkpoint)
    limits = QUICK if waits else Limits()
    # A source that is stuck is found out, and its destination is to hear of that before it gives up.
    patient = plan.side is Side.SOURCE and plan.slip is not_even_when_cancelled
    name = next(NAMES)
    register("bad", BadTransport)
    options = "?throttle.latency=1ms" if around else ""
    uri = TransportURI.parse(f"{around}bad:{name}{options}")
    async with trio.open_nursery() as strays, Machine.open(CONFIG) as source:
        await source.load(SPINNER)
        await source.start()
        over = trio.Event()

        async def receive(*, task_status: trio.TaskStatus[None]) -> None:
            try:
                incoming = IncomingMigration(
                    transport_for(uri if plan.side is Side.DESTINATION else TransportURI("bad", name)),
                    limits=Limits() if patient else limits,
                    keep_listening=False,
                    strays=strays,
                    on_listening=lambda uri: task_status.started(),
                    on_connected=lambda: setattr(outcome, "begun", True),
                )
                async with incoming.machine() as machine:
                    outcome.arrived = machine.state is State.RUNNING
                    await over.wait()
                    assert machine.state is State.RUNNING, "nothing ends a guest that has arrived"
            except KvmmigError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            await nursery.start(receive)
            migration = OutgoingMigration(
                source,
                transport_for(uri if plan.side is Side.SOURCE else TransportURI("bad", name)),
                policy=MaxRounds(1),
                limits=limits,
            )
            try:
                await migration.run(strays)
            except KvmmigError as error:
                errors.append(error)
            over.set()
            nursery.cancel_scope.deadline = trio.current_time() + (5 if waits else 30)
            if not outcome.begun:
                nursery.cancel_scope.cancel()  # it goes on listening for a source that gets further
        outcome.source, outcome.errors = source.state, tuple(errors)
        if outcome.unknown:
            await source.resume(force=True)
            assert source.state is State.RUNNING, "an operator can take it back"
        while STRAYS:
            STRAYS.pop().cancel()
    return outcome


@pytest.fixture(autouse=True)
def _ctrl_c_is_no_person_s() -> Iterator[None]:
    """As in a machine's process, which has a handler of its own."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


async def judge(plan: Plan, around: str = "") -> None:
    where = f"{plan.slip.__name__} in {plan.method} of the {plan.side.value} from {plan.when} on"
    with trio.move_on_after(60) as scope:
        outcome = await move(plan, around)
    assert not scope.cancelled_caught, f"it hangs, {where}"
    where += f": {'; '.join(map(str, outcome.errors))}"
    runs_here = outcome.source is State.RUNNING
    assert not (runs_here and outcome.arrived), f"two sides run, {where}"
    if outcome.unknown or outcome.arrived:
        assert outcome.source is State.MOVED, where
    else:
        assert runs_here, f"nobody runs it, {where}"
    its_log_says_it = (outcome.arrived or not outcome.begun) and plan.side is Side.DESTINATION
    if outcome.errors and not its_log_says_it and plan.method.endswith("some") and plan.slip in WORDS:
        said = " ".join(map(str, outcome.errors))
        assert "the transport 'bad' (from this program)" in said, where
        assert WORDS[plan.slip] in said, where


WORDS: dict[Slip, str] = {
    too_many: "returned",
    less_than_nothing: "returned -1 from",
    no_number: "returned None from",
    value_error: "raised ValueError: a slip from",
    system_exit: "raised SystemExit: 3 from",
    group: "raised BaseExceptionGroup: several",
    ctrl_c: "raised KeyboardInterrupt",
    generator_exit: "raised GeneratorExit",
}
SLIPS = [
    ctrl_c,
    generator_exit,
    too_many,
    less_than_nothing,
    no_number,
    no_checkpoint,
    value_error,
    system_exit,
    group,
    never,
]
PHASES = ["setup", "rounds", "final", "commit", "handed-over"]


@pytest.mark.parametrize("around", ["", "throttle+"])
@pytest.mark.parametrize("slip", SLIPS)
async def test_whatever_a_source_s_channel_does_one_side_runs(slip: Slip, around: str) -> None:
    for when in PHASES:
        for method in ("send_some", "receive_some"):
            await judge(Plan(Side.SOURCE, method, when, slip), around)


@pytest.mark.parametrize("around", ["", "throttle+"])
@pytest.mark.parametrize("slip", SLIPS)
async def test_whatever_a_destination_s_channel_does_one_side_runs(slip: Slip, around: str) -> None:
    for method, calls in (("send_some", (1, 2, 3)), ("receive_some", (1, 2, 5, 8)), ("aclose", (1,))):
        for call in calls:
            await judge(Plan(Side.DESTINATION, method, call, slip), around)


async def test_a_failing_task_of_a_channel_is_named_and_not_what_it_brings_down() -> None:
    outcome = await move(Plan(Side.SOURCE, "background", "rounds", value_error))
    assert "the transport 'bad' (from this program) raised ValueError: a slip" in str(outcome.errors)


async def test_a_channel_that_is_left_behind_is_aborted_so_that_its_other_side_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "GRACE", 0.05)
    with trio.fail_after(60):
        outcome = await move(Plan(Side.SOURCE, "send_some", "rounds", not_even_when_cancelled))
    assert any("the other side has closed it" in str(error) for error in outcome.errors), outcome.errors


@pytest.mark.parametrize("slip", [value_error, system_exit, group])
@pytest.mark.parametrize("side", list(Side))
async def test_what_a_channel_s_own_tasks_and_its_end_do_is_its_own_affair(side: Side, slip: Slip) -> None:
    for method in ("background", "exit", "abort"):
        for when in PHASES if side is Side.SOURCE else [1, 2]:
            await judge(Plan(side, method, when, slip))


@pytest.mark.parametrize("side", list(Side))
async def test_a_call_that_can_not_even_be_cancelled_is_left_behind(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "GRACE", 0.05)
    for method in ("send_some", "receive_some", "aclose", "exit"):
        for when in PHASES if side is Side.SOURCE else [1, 2, 3]:
            await judge(Plan(side, method, when, not_even_when_cancelled))
