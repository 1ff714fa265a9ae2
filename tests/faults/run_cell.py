"""One cell: let its fault happen to a real migration, and judge what comes of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from time import perf_counter

import trio

from kvmmig.errors import KvmmigError, MigrationCancelled, MigrationError, OutcomeUnknown
from kvmmig.machine import State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import PAGE_SIZE, Continue, Decision, Limits, Policy, RoundFigures, Stop
from kvmmig.migration.report import Phase
from kvmmig.transport.registry import transport_for
from tests.faults.empty_cells import why_not
from tests.faults.hold import HoldingWrapper
from tests.faults.host import Host
from tests.faults.matrix import OF_A_PEER, SLOW, Cell, Fault, Moment, Outcome, Verdict
from tests.faults.other_sides import OtherSide, ProcessSide, other_side_for
from tests.faults.resources import Resources
from tests.faults.source import HOT, Source
from tests.faults.waiting import PATIENCE, until

LIMIT = 1.0  # seconds: each of the limits of these migrations
#: Seconds within which every fault must have become an error: one limit, the 2 s that a helper that has
#: closed its pipe gets for its last words, and half a second for a busy host.
NOTICE = LIMIT + 2.0 + 0.5
CANCEL = 0.1  # seconds within which a cancel must have given the guest back
TURN = 0.1  # seconds that no turn of the event loop may take

_RATE = 64e6  # bytes a second until the strike, so that no moment is over too soon
_CRAWL = 1e6
_LIMITS = Limits(
    connect_timeout=LIMIT, setup_timeout=LIMIT, stall_timeout=LIMIT, handover_timeout=LIMIT, bandwidth=_RATE
)
#: Where nothing fails no limit must end it.
_LONG_LIMITS = Limits(bandwidth=_RATE)
_LASTING = 0.2  # seconds that a fault has lasted when the cancel comes

#: Over tcp these hang the flush of the commit, or its wait for the answer: both are tried.
_WHILE_FLUSHING = frozenset({Fault.LINK_CUT, Fault.PEER_STOPPED})
_CONGESTED = 2_000_000  # bytes a second: slow enough that something is on its way when the strike comes

_NOT_CONFIRMED = r"(did not take the last bytes|was not done) within"
_CAUSE = {
    Fault.LINK_CUT: r"accepted nothing for|did not (say|take)|gave no connection|no route|does not answer",
    Fault.PEER_KILLED: r"closed the connection|cut the connection|nobody listens|SIGKILL|status 137",
    Fault.PEER_STOPPED: rf"accepted nothing for|did not say|{_NOT_CONFIRMED}",
    Fault.HELPER_KILLED: r"SIGKILL|status 137",
    Fault.HELPER_STOPPED: "is stopped",
    Fault.DISK_FULL: r"(?i)no space (is )?left",
    Fault.WRITE_ERROR: r"(?i)I/O error|input/output error",
    Fault.NOT_WRITABLE: r"(?i)read-only|permission|nobody listens|not a socket|Operation not permitted",
    Fault.FROZEN: "does not answer|has not answered|gave no connection",
}


class Script(Policy):
    """Goes on for ever; or stops the guest, ``at_once`` or after rounds that leave enough for the final pass.

    That is more than any way to the other side swallows. A guest on a busy host needs slower rounds for it.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.at_once = False

    def decide(self, figures: RoundFigures) -> Decision:
        if self.at_once:
            return Stop()
        if not self.stop or figures.round == 0:
            return Continue()
        if figures.remaining_bytes < HOT * 0.9:
            return Continue(bandwidth=figures.rate / 2)
        return Stop(bandwidth=_RATE)


@dataclass
class Run:
    """What came of one run of a cell."""

    error: KvmmigError | None = None
    noticed: float | None = None
    cancelled: float | None = None
    worst_turn: float = 0.0
    taken_back: bool = False
    problems: list[str] = field(default_factory=list)
    #: Problems that a busy host can be to blame for.
    late: list[str] = field(default_factory=list)


async def judge(cell: Cell, host: Host, source: Source) -> Outcome:
    """The whole of a cell: the fault's own way, and a cancel while it lasts."""
    nothing = why_not(cell, host)
    if nothing:
        verdict, reason = nothing
        return Outcome(
            transport=cell.transport, fault=cell.fault, moment=cell.moment, verdict=verdict, reason=reason
        )
    try:
        runs = await _runs(cell, host, source)
        if any(run.late for run in runs) and not any(run.problems for run in runs):
            runs = await _runs(cell, host, source)  # what is late twice is late by itself
    except Exception as error:  # whatever it is, the other cells are worth knowing
        runs = [Run(problems=[f"it crashed: {error!r}"])]
    problems = tuple(problem for run in runs for problem in (*run.problems, *run.late))
    return Outcome(
        transport=cell.transport,
        fault=cell.fault,
        moment=cell.moment,
        verdict=Verdict.RED if problems else Verdict.GREEN,
        problems=problems,
        error=str(runs[0].error or ""),
        noticed=max((run.noticed for run in runs if run.noticed is not None), default=None),
        cancelled=runs[-1].cancelled,
        worst_turn=max(run.worst_turn for run in runs),
        taken_back=any(run.taken_back for run in runs),
    )


async def _runs(cell: Cell, host: Host, source: Source) -> list[Run]:
    runs = []
    if cell.fault not in SLOW:
        runs.append(await attempt(cell, host, source))
    if cell.moment is Moment.COMMIT and cell.fault in _WHILE_FLUSHING and cell.transport == "tcp":
        runs.append(await attempt(cell, host, source, congested=True))
    # A fault that is noticed at once leaves nobody the time to cancel.
    if not runs or ((runs[0].noticed or 0.0) > _LASTING and not runs[0].problems):
        runs.append(await attempt(cell, host, source, cancel=True))
    return runs


async def attempt(
    cell: Cell, host: Host, source: Source, *, cancel: bool = False, congested: bool = False
) -> Run:
    """One migration that is struck, and perhaps cancelled then.

    ``congested``: the commit begins, and is struck, while the last bytes are still on their way.
    """
    run = Run()
    async with other_side_for(cell, host) as side:
        before = Resources.now()
        script = Script(stop=cell.moment in (Moment.FINAL, Moment.COMMIT, Moment.HANDED_OVER))
        transport = transport_for(side.uri)
        migration = OutgoingMigration(
            source.machine,
            HoldingWrapper(transport, side.hold, side.settle),
            policy=script,
            limits=_limits(cell),
        )
        ended = trio.Event()

        async def migrate() -> None:
            try:
                await migration.run()
            except KvmmigError as error:
                run.error = error
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            struck = perf_counter()
            if cell.moment is Moment.CONNECT:
                await side.strike()
                struck = perf_counter()
                nursery.start_soon(migrate)
            else:
                nursery.start_soon(migrate)
                await _wait_for_moment(cell, side, migration, ended, congested)
                if ended.is_set():
                    run.problems.append(f"it ended before the {cell.moment}: {run.error}")
                migration.set_bandwidth(_CRAWL)  # or the moment might be over before the fault is there
                struck = perf_counter()
                await side.strike()
                if cell.fault is Fault.NOT_WRITABLE:
                    script.at_once = True  # only the commit can notice
                if side.hold:
                    side.hold.released.set()
                migration.set_bandwidth(None)
            if cancel:
                await _cancel(cell, side, migration, ended, run)
            else:
                with trio.move_on_after(PATIENCE):
                    await ended.wait()
                if ended.is_set():
                    run.noticed = perf_counter() - struck
                    _judge_error(cell, side, run)
            if not ended.is_set():
                phase = migration.statistics().phase
                run.problems.append(f"it still went on after {PATIENCE:g} s, in {phase}")
                nursery.cancel_scope.cancel()
        run.worst_turn = migration.statistics().worst_stall
        if run.worst_turn > TURN:
            ran = migration.statistics().worst_turn_ran
            run.late.append(f"a turn of the event loop took {run.worst_turn:.3f} s, in {ran}")
        if isinstance(run.error, OutcomeUnknown):
            await _take_back(cell, side, source, run)
        run.problems += await source.faults()
        await side.heal()
        run.problems += await _left(side, before)
    return run


def _limits(cell: Cell) -> Limits:
    if cell.fault in SLOW:
        return _LONG_LIMITS
    if cell.transport == "exec":  # connecting means starting a Python
        return replace(_LIMITS, connect_timeout=PATIENCE)
    return _LIMITS


async def _wait_for_moment(
    cell: Cell, side: OtherSide, migration: OutgoingMigration, ended: trio.Event, congested: bool
) -> None:
    """Return at the moment that the fault is to strike, or when the migration has ended."""
    if side.hold and not (cell.fault is Fault.SLOW_SINK and cell.moment is Moment.COMMIT):
        with trio.move_on_after(PATIENCE):
            await side.hold.reached.wait()
        return

    end = 0  # of the final pass: bytes sent by then, as far as it can be told when it begins

    def bytes_left() -> float:
        nonlocal end
        now = migration.statistics()
        if now.phase is not Phase.FINAL:
            return math.inf
        end = end or now.sent_bytes + now.remaining_pages * PAGE_SIZE
        return end - now.sent_bytes

    def there() -> bool:
        now = migration.statistics()
        match cell.moment:
            case Moment.HELLO:
                return now.phase is Phase.SETUP and now.sent_bytes > 0
            case Moment.FIRST:
                return now.phase is Phase.ROUNDS and now.sent_bytes > 1 << 20
            case Moment.LATER:
                return now.phase is Phase.ROUNDS and len(now.rounds) >= 2
            case Moment.FINAL:
                return now.phase is Phase.FINAL
            case Moment.HANDED_OVER:
                return now.phase is Phase.HANDED_OVER
        # A sink must be slow before the commit, which it makes long: when the way can swallow the rest.
        early = cell.fault is Fault.SLOW_SINK and bytes_left() <= side.swallows
        return early or now.phase is Phase.COMMIT

    if congested and isinstance(side, ProcessSide):
        await until(lambda: ended.is_set() or bytes_left() <= _CONGESTED)
        migration.set_bandwidth(_CRAWL)
        await side.slow_down(_CONGESTED)
        migration.set_bandwidth(None)
    await until(lambda: ended.is_set() or there())


async def _cancel(
    cell: Cell, side: OtherSide, migration: OutgoingMigration, ended: trio.Event, run: Run
) -> None:
    with trio.move_on_after(_LASTING):
        await ended.wait()
    if ended.is_set():  # else than the first time, the fault was noticed before anybody could cancel
        _judge_error(cell, side, run)
        return
    if cell.fault in SLOW:
        run.problems += _not_at(cell.moment, migration.statistics().phase)
    began = perf_counter()
    try:
        migration.cancel()
    except MigrationError as error:
        if _may_be_unknown(cell):
            await until(ended.is_set)
        else:
            run.problems.append(f"it could not be cancelled: {error}")
        return
    with trio.move_on_after(PATIENCE):
        await ended.wait()
    run.cancelled = perf_counter() - began
    if run.cancelled > CANCEL:
        run.late.append(f"the cancel took {run.cancelled * 1e3:.0f} ms")
    if not isinstance(run.error, MigrationCancelled):
        run.problems.append(f"the cancel ended in another error: {run.error}")


def _may_be_unknown(cell: Cell) -> bool:
    """ "go" was offered to somebody who may start the guest: nobody here can know whether they did.

    A command can't answer. Where it has taken all before, its fault is noticed only behind "go".
    """
    of_a_command = cell.transport == "exec" and cell.moment is Moment.COMMIT and cell.fault in OF_A_PEER
    return of_a_command or cell.moment is Moment.HANDED_OVER


async def _take_back(cell: Cell, side: OtherSide, source: Source, run: Run) -> None:
    """Do as the operator does: see to it that the other side is dead, and take the guest back."""
    side.kill()
    if not _may_be_unknown(cell):
        run.problems.append("it ended without anybody knowing who has the guest")
    if source.machine.state is not State.MOVED:
        run.problems.append(f"nobody knows who has the guest, and here it {source.machine.state}")
    await source.machine.resume(force=True)
    run.taken_back = True


_PHASES = {
    Moment.CONNECT: Phase.SETUP,
    Moment.HELLO: Phase.SETUP,
    Moment.FIRST: Phase.ROUNDS,
    Moment.LATER: Phase.ROUNDS,
    Moment.FINAL: Phase.FINAL,
    Moment.COMMIT: Phase.COMMIT,
    Moment.HANDED_OVER: Phase.HANDED_OVER,
}


def _not_at(moment: Moment, phase: Phase) -> list[str]:
    return [] if phase is _PHASES[moment] else [f"it was in {phase} and not in the {moment} when cancelled"]


def _judge_error(cell: Cell, side: OtherSide, run: Run) -> None:
    if run.error is None or isinstance(run.error, MigrationCancelled):
        run.problems.append("the fault went unnoticed")
        return
    if cell.moment is Moment.HANDED_OVER and not isinstance(run.error, OutcomeUnknown):
        run.problems.append(f"it was handed over, and ended in another error: {run.error}")
    if run.noticed is not None and run.noticed > NOTICE:
        run.late.append(f"it was noticed only after {run.noticed:.1f} s")
    text = str(run.error)
    if cell.fault in SLOW:
        run.problems.append(f"what is only slow ended it: {text}")
    elif not re.search(_CAUSE[cell.fault], text):
        run.problems.append(f"the error does not name the cause: {text}")
    if side.name not in text:
        run.problems.append(f"the error does not name {side.name}: {text}")


async def _left(side: OtherSide, before: Resources) -> list[str]:
    """What is left; what is on its way out gets the time for it."""
    await until(lambda: not Resources.now().added_since(before), every=0.01)
    found = Resources.now().added_since(before)
    return [*found, *await trio.to_thread.run_sync(side.leftovers)]
