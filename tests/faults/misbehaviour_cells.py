"""Every breach of the contract by a transport, at every point, on both sides, and what comes of it.

Both machines are in this process, so that it is known which of them runs.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter

import trio

from kvmmig.errors import KvmmigError, MigrationCancelled, OutcomeUnknown
from kvmmig.machine import Machine, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.phases import Phase
from kvmmig.migration.policy import Continue, Decision, Limits, Policy, RoundFigures, Stop
from kvmmig.migration.stall_meter import StallMeter
from kvmmig.transport import Side, Transport, TransportURI
from kvmmig.transport.guard import GRACE
from kvmmig_transports.throttle import ThrottleWrapper
from tests.faults.matrix import Outcome, Verdict
from tests.faults.misbehaving import CALLS, Misbehaviour, Plan, Point, RogueTransport, Way
from tests.faults.source import Source
from tests.faults.waiting import PATIENCE, until

_LIMIT = 1.0  # seconds: each of the limits of these migrations, but one
_SETUP = 3.0  # seconds: the destination makes a machine in it
#: Seconds within which the guest must be back: one limit, then what never returns is found out, and is given
#: time to end; and half a second for a busy host.
ENDED = _SETUP + 2 * GRACE + 0.25 + 0.5
#: Seconds that no turn of the event loop, and so no answer of a monitor, may take. Several migrations share
#: this one, and the CPUs; what a rogue held would be held for ever.
TURN = 0.5
_RATE = 300e6  # bytes a second: slow enough that the guest writes much of its memory in each round
_LIMITS = Limits(
    connect_timeout=_LIMIT,
    setup_timeout=_SETUP,
    stall_timeout=_LIMIT,
    handover_timeout=_LIMIT,
    bandwidth=_RATE,
)
_ROUNDS, _MOST_ROUNDS = 3, 50
_LATENCY, _THROTTLE = "2ms", "500MB/s"  # a window of a megabyte

_CULPRIT = "the transport 'rogue' (from this program)"
_RULES = {
    Misbehaviour.LARGE_COUNT: r"returned \d+ from \w+ (where|into a buffer of) \d+",
    Misbehaviour.NO_COUNT: r"returned None from \w+|gave a NoneType",
    Misbehaviour.VALUE_ERROR: r"raised ValueError: a bug from \w+",
    Misbehaviour.SYSTEM_EXIT: r"raised SystemExit: 3 from \w+",
    Misbehaviour.GROUP: r"raised ExceptionGroup: two bugs \(2 sub-exceptions\) from \w+",
    Misbehaviour.HANGS_SHIELDED: r"did not return from \w+",
    Misbehaviour.NO_CHECKPOINT: r"returned from \w+ \d+ times without a checkpoint",
}
#: To wait is no crime: who waits says for what.
_WAITED = r"accepted nothing for|nobody listens|did not (say|take)|gave no connection|was not done within"

_HANGS = frozenset({Misbehaviour.HANGS, Misbehaviour.HANGS_SHIELDED})
_names = count()


@dataclass(frozen=True, slots=True)
class MisbehaviourCell:
    """One cell. ``transport`` is the whole title of its table."""

    way: Way
    side: Side
    throttled: bool
    misbehaviour: Misbehaviour
    point: Point

    @property
    def transport(self) -> str:
        """Its table."""
        wrapper = "throttle+" if self.throttled else ""
        return f"{wrapper}rogue, {self.way}, at the {self.side.value}"

    @property
    def fault(self) -> str:
        """Its row."""
        return self.misbehaviour

    @property
    def moment(self) -> str:
        """Its column."""
        return self.point

    @property
    def handed_over(self) -> bool:
        """Whether the guest may be the other side's by then."""
        return self.way is not Way.STORED and self.point in (Point.GO, Point.ANSWER, Point.CLOSE)

    @property
    def waits_for_ever(self) -> bool:
        """A destination waits as long as its source may live: until it is cancelled."""
        return self.side is Side.DESTINATION and self.misbehaviour in _HANGS

    @property
    def passed_over(self) -> bool:
        """A wrapper goes on listening where what a client's connection gave is of no use."""
        here = self.throttled and self.side is Side.DESTINATION and self.point is Point.CONNECT
        return here and self.misbehaviour is Misbehaviour.NO_COUNT

    @property
    def may_be_handed_over(self) -> bool:
        """A destination's last word before the hand-over may have been heard."""
        return self.handed_over or (self.side is Side.DESTINATION and self.point is Point.COMMIT)

    @property
    def may_go_unnoticed(self) -> bool:
        """Nobody tells a source whose channel goes one way how its guest fares."""
        return self.way is Way.ONE_WAY and self.side is Side.DESTINATION and self.point is Point.GO

    @property
    def runs_there(self) -> bool:
        """Whether it happens when the guest runs at the destination."""
        return self.side is Side.DESTINATION and self.point in (Point.ANSWER, Point.CLOSE)

    def __str__(self) -> str:
        return f"{self.transport}, {self.misbehaviour}, {self.point}"


def misbehaviour_cells() -> list[MisbehaviourCell]:
    """All of them, table by table."""
    return [
        MisbehaviourCell(way, side, throttled, misbehaviour, point)
        for throttled in (False, True)
        for way, side in CALLS
        for misbehaviour in Misbehaviour
        for point in Point
        if point in CALLS[way, side]
    ]


def why_impossible(cell: MisbehaviourCell) -> str:
    """Why there is nothing to see in a cell; empty if there is."""
    call = CALLS[cell.way, cell.side][cell.point]
    counts = call in ("send_some", "receive_some")
    match cell.misbehaviour:
        case Misbehaviour.LARGE_COUNT if not counts:
            return "nothing is counted there"
        case Misbehaviour.NO_COUNT if call in ("flush", "aclose", "abort"):
            return "None is right there"
        case Misbehaviour.HANGS | Misbehaviour.HANGS_SHIELDED if call == "abort":
            return "what is synchronous, and hangs, holds the event loop: no guard can help"
        case Misbehaviour.NO_CHECKPOINT if call != "send_some" or cell.point not in (
            Point.FIRST,
            Point.LATER,
            Point.FINAL,
        ):
            return "it is called there once, which is harmless"
        case Misbehaviour.ABORT_RAISES if cell.point in (Point.GO, Point.ANSWER, Point.CLOSE):
            return "there is nothing to cancel any more"
    return ""


class _Rounds(Policy):
    """A few rounds; more while there is nothing to send, or the later one has not been struck."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def decide(self, figures: RoundFigures) -> Decision:
        early = self._plan.at is Point.LATER and self._plan.began is None
        if figures.round < _ROUNDS or early or not figures.dirty_pages:
            return Continue() if figures.round < _MOST_ROUNDS else Stop()
        return Stop()


@dataclass
class _Run:
    cell: MisbehaviourCell
    error: KvmmigError | None = None
    there_error: KvmmigError | None = None
    there: Machine | None = None
    begun: bool = False  # the destination has a source that sends a guest
    took: float | None = None
    problems: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)


async def judge_misbehaviour(cell: MisbehaviourCell, source: Source) -> Outcome:
    """The whole of a cell; what was late is tried once more."""
    if reason := why_impossible(cell):
        return Outcome(
            transport=cell.transport,
            fault=cell.fault,
            moment=cell.moment,
            verdict=Verdict.IMPOSSIBLE,
            reason=reason,
        )
    for _ in range(2):
        run = _Run(cell)
        with StallMeter() as meter:
            try:
                with trio.fail_after(4 * PATIENCE):
                    await _attempt(run, source)
            except Exception as error:  # whatever it is, the other cells are worth knowing
                run.problems.append(f"it crashed: {error!r}")
        worst = meter.turns.snapshot().worst
        if worst > TURN:
            run.late.append(f"a turn of the event loop took {worst:.3f} s")
        if run.problems or not run.late:
            break
    problems = (*run.problems, *run.late)
    return Outcome(
        transport=cell.transport,
        fault=cell.fault,
        moment=cell.moment,
        verdict=Verdict.RED if problems else Verdict.GREEN,
        problems=problems,
        error=str(run.error or run.there_error or ""),
        noticed=run.took,
        worst_turn=worst,
        taken_back=isinstance(run.error, OutcomeUnknown),
    )


async def _attempt(run: _Run, source: Source) -> None:
    """One migration; ``source`` has its guest again afterwards."""
    cell = run.cell
    target = f"cell-{next(_names)}"
    plan = Plan(cell.way, cell.side, cell.misbehaviour, cell.point)
    honest = Plan(cell.way, Side.SOURCE)
    plans = {side: plan if side is cell.side else honest for side in Side}
    migration = OutgoingMigration(
        source.machine,
        _transport(target, plans[Side.SOURCE], cell.throttled and cell.side is Side.SOURCE),
        policy=_Rounds(plan),
        limits=_LIMITS,
    )
    plan.point = lambda: _point(migration)
    there = _transport(target, plans[Side.DESTINATION], cell.throttled and cell.side is Side.DESTINATION)
    async with trio.open_nursery() as strays:
        async with _destination(run, there, plan, strays) as ended:
            if cell.side is Side.SOURCE:
                plan.cancel = migration.cancel
            began = perf_counter()
            try:
                with trio.fail_after(3 * PATIENCE):  # how slow a busy host makes it is not judged
                    await migration.run(strays)
            except KvmmigError as error:
                run.error = error
            except (Exception, SystemExit) as error:
                run.problems.append(f"the source crashed: {error!r}")
            run.took = perf_counter() - max(plan.began or began, began)
            if run.took > ENDED:
                run.late.append(f"the source took {run.took:.1f} s")
            if cell.way is not Way.STORED:
                with trio.move_on_after(
                    # Who has not begun to send is passed over: the destination goes on listening.
                    0.1 if (cell.waits_for_ever or not run.begun) and not run.there else PATIENCE
                ):
                    await ended.wait()
            if cell.runs_there:  # the guest runs before its channel is closed
                await until(lambda: plan.began is not None)
            await _judge(run, source, plan)
        plan.released.set()
    if source.machine.state is not State.RUNNING:
        await source.machine.resume(force=True)  # the other side is dead
    run.problems += await source.faults()


def _transport(target: str, plan: Plan, throttled: bool) -> Transport:
    rogue = RogueTransport(target, plan)
    if not throttled:
        return rogue
    options = {"throttle.latency": _LATENCY, "throttle.rate": _THROTTLE}
    return ThrottleWrapper(TransportURI("rogue", target, options, wrappers=("throttle",)), rogue)


def _point(migration: OutgoingMigration) -> Point | None:
    match migration.phase:
        case Phase.SETUP:
            return Point.HELLO
        case Phase.ROUNDS:
            return {0: Point.FIRST, 1: None}.get(len(migration.statistics().rounds), Point.LATER)
        case Phase.FINAL:
            return Point.FINAL
        case Phase.COMMIT:
            return Point.COMMIT
        case Phase.HANDED_OVER:
            return Point.GO
    return None


@asynccontextmanager
async def _destination(
    run: _Run, transport: Transport, plan: Plan, strays: trio.Nursery
) -> AsyncIterator[trio.Event]:
    """A destination, if there is one. The event: it has failed, or has the guest and no channel any more."""
    ended = trio.Event()
    if run.cell.way is Way.STORED:
        yield ended
        return
    scope = trio.CancelScope()
    listens = trio.Event()

    async def receive() -> None:
        incoming = IncomingMigration(
            transport,
            # Longer than the source's: so it is the source that finds out first.
            limits=replace(_LIMITS, stall_timeout=PATIENCE, handover_timeout=PATIENCE),
            keep_listening=False,
            on_listening=lambda uri: listens.set(),
            on_connected=lambda: setattr(run, "begun", True),
            on_here=lambda machine: setattr(run, "there", machine),
            strays=strays,
        )
        with scope:
            try:
                async with incoming.machine():
                    ended.set()
                    await trio.sleep_forever()
            except KvmmigError as error:
                run.there_error = error
            except (Exception, SystemExit) as error:
                run.problems.append(f"the destination crashed: {error!r}")
            finally:
                listens.set()
                ended.set()

    if run.cell.side is Side.DESTINATION:
        plan.cancel = scope.cancel
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        if run.cell.point is Point.LISTEN:
            with trio.move_on_after(ENDED):
                await listens.wait()
        else:
            await listens.wait()
        yield ended
        began = perf_counter()
        scope.cancel()
        with trio.move_on_after(PATIENCE):
            await ended.wait()
        if (took := perf_counter() - began) > ENDED:
            run.late.append(f"the destination took {took:.1f} s to be cancelled")


async def _judge(run: _Run, source: Source, plan: Plan) -> None:
    """While all that there is still is there."""
    cell, problems, state = run.cell, run.problems, source.machine.state
    if plan.began is None:
        problems.append(f"it never misbehaved; the source: {run.error}, the destination: {run.there_error}")
    runs_there = run.there is not None and run.there.state is State.RUNNING
    if state is State.RUNNING and runs_there:
        problems.append("both sides run")
    if cell.handed_over and state is State.RUNNING:
        problems.append("the source runs although the guest was handed over")
    if not cell.handed_over:
        if state is not State.RUNNING and not cell.may_be_handed_over:
            problems.append(f"nothing was handed over, and at the source the guest {state}")
        if cell.way is Way.STORED and cell.point is Point.CLOSE and run.error is None:
            problems.append("the source reports success")
    if cell.runs_there:
        if not runs_there:
            problems.append(f"the guest does not run at the destination: {run.there_error}")
        else:
            assert run.there is not None
            problems += [f"at the destination {fault}" for fault in await Source(run.there).faults()]
    elif run.error is None and not cell.may_go_unnoticed and not (cell.handed_over and runs_there):
        problems.append("the source reports success")
    if state is State.MOVED and run.error is not None and not isinstance(run.error, OutcomeUnknown):
        problems.append(f"it was handed over, and ended in another error: {run.error}")
    problems += _sentence(run)


def _sentence(run: _Run) -> list[str]:
    """Whether the side that has the rogue names it, and the rule."""
    cell = run.cell
    error = run.error if cell.side is Side.SOURCE else run.there_error
    if (
        cell.passed_over
        or (cell.side is Side.DESTINATION and not run.begun and cell.point is not Point.LISTEN)
        or cell.runs_there
        or cell.may_go_unnoticed
        or (cell.handed_over and run.error is None)
    ):
        return []  # it goes to the log
    if cell.misbehaviour is Misbehaviour.ABORT_RAISES:
        right = cell.side is Side.DESTINATION or isinstance(error, MigrationCancelled)
        return [] if right else [f"the cancel ended in another error: {error}"]
    if cell.misbehaviour in _HANGS and re.search(_WAITED, str(run.error)):
        return []
    if cell.misbehaviour is Misbehaviour.HANGS or cell.waits_for_ever:
        return [f"the error does not say what was missing: {run.error}"]
    text = str(error)
    if _CULPRIT not in text or not re.search(_RULES[cell.misbehaviour], text):
        return [f"the error does not name the culprit and the rule: {text}"]
    return []
