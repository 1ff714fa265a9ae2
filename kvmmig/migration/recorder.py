"""Makes events of what happens in a migration, for whoever wants to have it recorded.

With nobody who listens all of it costs a comparison. Called on the event loop, like the migration itself.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import cache
from time import perf_counter
from typing import Protocol

import msgspec
import trio

from kvmmig import __version__, stream
from kvmmig.migration.events import (
    SWITCHOVER_PARTS,
    Begun,
    Changed,
    Decided,
    DirtyLogRead,
    Ended,
    GuestStarted,
    HeldBy,
    Host,
    PagesMapped,
    PhaseBegun,
    Received,
    RecordedEvent,
    RoundSent,
    SideName,
    SwitchedOver,
    TurnTaken,
)
from kvmmig.migration.pagemap import PageMap
from kvmmig.migration.policy import Continue, Decision, GiveUp, Limits, RoundFigures, Stop
from kvmmig.migration.recordfile import RecordFile, recording
from kvmmig.migration.report import MigrationStatistics
from kvmmig.migration.sendwatch import SendWatch, Tell
from kvmmig.migration.stall_meter import Durations

#: Seconds of a turn that is worth an event.
_TURN = 0.001
_LAPS = {
    "pause": "park",
    "waiting to proceed": "proceed",
    "state": "capture",
    "dirty log": "last_log",
    "memory": "pages",
    "end": "state",
}
#: Blocks of a page map.
MAP_BLOCKS = 128


class _Described(msgspec.Struct):
    """What is taken from a machine's description."""

    name: str = ""
    memory: int = 0
    cpus: int = 1
    parameters: Mapping[str, int | str] = {}


class FiguresOfReceiving(Protocol):
    """What a destination knows at its end; `IncomingMigration` is one."""

    @property
    def received_pages(self) -> int: ...
    @property
    def zero_pages(self) -> int: ...
    @property
    def received_bytes(self) -> int: ...
    @property
    def turns(self) -> Durations: ...


class Recorder:
    """One side of one migration."""

    def __init__(
        self, side: SideName, on_event: Tell | None, path: str | os.PathLike[str] | None = None
    ) -> None:
        """``on_event`` is told all, and what is told while `recording` lasts goes to the file ``path``."""
        self._side = side
        self._listeners = [] if on_event is None else [on_event]
        self._path = path
        self._file: RecordFile | None = None
        self._watch: SendWatch | None = None
        #: Whom events are told to; None where nobody listens.
        self.tell: Tell | None = self._tell_all if on_event is not None or path is not None else None
        self._known = False
        self._begun_at = 0.0
        self._marks: dict[str, float] = {}
        self._mark = 0.0
        self._stopped_at: float | None = None
        self._count_exits: Callable[[], Mapping[str, int]] = dict
        self._exits_before: Mapping[str, int] = {}

    @asynccontextmanager
    async def recording(
        self, figures: Callable[[], MigrationStatistics] | None = None
    ) -> AsyncIterator[None]:
        """The file, if there is to be one, for as long as this block lasts; see `recordfile.recording`.

        ``figures`` are a source's; with them, the end of the block is recorded as its end.
        """
        async with AsyncExitStack() as stack:
            if self._path is not None:
                self._file = await stack.enter_async_context(recording(self._path))
                self._listeners.append(self._file.tell)
            try:
                yield
            finally:
                if figures is not None:
                    self._ended_source(figures())

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the file lacks something: a sentence, or none."""
        return (self._file.problem,) if self._file is not None and self._file.problem else ()

    def _tell_all(self, event: RecordedEvent) -> None:
        # A destination does not know what is beginning until the hello is there.
        self._known = self._known or isinstance(event, Begun)
        if not self._known:
            return
        for listener in self._listeners:
            listener(event)

    def begun(
        self, uri: str, identity: bytes, machine: bytes, policy: str = "", limits: Limits | None = None
    ) -> None:
        """It begins; ``machine`` is the JSON that describes it."""
        if self.tell is None:
            return
        described = msgspec.json.decode(machine, type=_Described)
        self._begun_at = perf_counter()
        self.tell(
            Begun(
                at=perf_counter(),
                side=self._side,
                stream=identity.hex(),
                clock=clock(),
                wall=time.time(),
                uri=uri,
                host=host(),
                pid=os.getpid(),
                guest=described.name,
                memory=described.memory,
                page_size=stream.PAGE_SIZE,
                cpus=described.cpus,
                parameters=described.parameters,
                policy=policy,
                limits=asdict(limits) if limits is not None else {},
            )
        )

    def phase(self, phase: str) -> None:
        """The next phase begins."""
        if self.tell is not None:
            self.tell(PhaseBegun(at=perf_counter(), phase=phase))

    def round(self, figures: RoundFigures, began: float, bandwidth: float | None, throttle: float) -> None:
        """A round was sent."""
        if self.tell is not None:
            self.tell(
                RoundSent(
                    at=began,
                    round=figures.round,
                    duration=figures.duration,
                    sent_pages=figures.sent_pages,
                    zero_pages=figures.zero_pages,
                    sent_bytes=figures.sent_bytes,
                    dirty_pages=figures.dirty_pages,
                    bandwidth=bandwidth,
                    throttle=throttle,
                    spent=self._spent(),
                    exits=self._exits(),
                )
            )

    def dirty_log(self, began: float, pages: int) -> None:
        """The dirty log was read."""
        if self.tell is not None:
            self.tell(DirtyLogRead(at=began, duration=perf_counter() - began, pages=pages))

    def page_map(self, round: int, make: Callable[[int], PageMap]) -> None:
        """A map is to be made by ``make``, which gets the number of its blocks."""
        if self.tell is not None:
            made = make(MAP_BLOCKS)
            self.tell(
                PagesMapped(
                    at=perf_counter(),
                    round=round,
                    block_pages=made.block_pages,
                    pending=made.pending,
                    sent=made.sent,
                )
            )

    def decided(self, round: int, policy: str, decision: Decision | None) -> None:
        """The policy has spoken; None is the limit of time."""
        if self.tell is None:
            return
        now = perf_counter()
        match decision:
            case None:
                self.tell(Decided(at=now, round=round, policy=policy, decision="out of time"))
            case Continue(bandwidth, throttle):
                self.tell(
                    Decided(
                        at=now,
                        round=round,
                        policy=policy,
                        decision="continue",
                        bandwidth=bandwidth,
                        throttle=throttle,
                    )
                )
            case Stop(bandwidth):
                self.tell(Decided(at=now, round=round, policy=policy, decision="stop", bandwidth=bandwidth))
            case GiveUp(reason):
                self.tell(Decided(at=now, round=round, policy=policy, decision="give up", reason=reason))

    def changed(self, what: str, value: object = "") -> None:
        """Somebody changed something while the migration ran."""
        if self.tell is not None:
            self.tell(Changed(at=perf_counter(), what=what, value="none" if value is None else str(value)))

    def stopping(self) -> None:
        """The guest is about to be stopped: the parts of the downtime begin."""
        self._stopped_at = self._mark = perf_counter()
        self._marks = dict.fromkeys(SWITCHOVER_PARTS, 0.0)

    def part(self, lap: str) -> None:
        """A part of the downtime, by its name in `Laps` or in `SWITCHOVER_PARTS`, has come to its end."""
        if self._stopped_at is not None:
            now = perf_counter()
            self._marks[_LAPS.get(lap, lap)] += now - self._mark
            self._mark = now

    def gone(self) -> None:
        """The last part has."""
        self.part("commit")
        if self.tell is not None and self._stopped_at is not None:
            self.tell(SwitchedOver(at=self._stopped_at, **self._marks))

    def final_pass(self, figures: RoundFigures, began: float) -> None:
        """The last pages were sent, with the guest stopped."""
        if self.tell is not None:
            self.tell(
                RoundSent(
                    at=began,
                    round=figures.round,
                    final=True,
                    duration=figures.duration,
                    sent_pages=figures.sent_pages,
                    zero_pages=figures.zero_pages,
                    sent_bytes=figures.sent_bytes,
                    spent=self._spent(),
                    exits=self._exits(),
                )
            )

    def watch(self, *, stores: bool, waits_for: Callable[[], str]) -> SendWatch | None:
        """Who watches a sender; None where nobody listens."""
        if self.tell is not None:
            self._watch = SendWatch(self.tell, "disk" if stores else "link", waits_for)
        return self._watch

    def watch_exits(self, count: Callable[[], Mapping[str, int]]) -> None:
        """``count`` says how often the vCPUs have left the guest so far."""
        self._count_exits = count

    def begin_round(self) -> None:
        """What time is spent on, and exits, count from here."""
        self._spent()
        self._exits()

    def _spent(self) -> Mapping[HeldBy, float]:
        return self._watch.take_spent() if self._watch is not None else {}

    def _exits(self) -> Mapping[str, int]:
        """Since the last call of this."""
        if self.tell is None:
            return {}
        before, self._exits_before = self._exits_before, dict(self._count_exits())
        now = self._exits_before
        return {name: now[name] - before.get(name, 0) for name in now if now[name] > before.get(name, 0)}

    def turn(self, began: float, ended: float, task: str) -> None:
        """For `StallMeter`: a turn of the event loop."""
        if self.tell is not None and ended - began >= _TURN:
            self.tell(TurnTaken(at=began, duration=ended - began, task=task))

    def received(self, began: float, pages: int, *, zero: bool) -> None:
        """A frame of pages has come."""
        if self.tell is not None:
            self.tell(Received(at=began, duration=perf_counter() - began, pages=pages, zero=zero))

    def here(self, *, runs: bool) -> None:
        """The guest is here, and ``runs`` if it ran."""
        if self.tell is not None and runs:
            self.tell(GuestStarted(at=perf_counter()))
        self.phase("running")

    def _ended_source(self, figures: MigrationStatistics) -> None:
        """It has come to its end here."""
        if self.tell is not None:
            self.tell(
                Ended(
                    at=perf_counter(),
                    outcome=str(figures.phase),
                    error=figures.error,
                    total_time=figures.total_time,
                    downtime=figures.downtime,
                    setup_time=figures.setup_time,
                    expected_downtime=figures.expected_downtime,
                    bytes=figures.sent_bytes,
                    pages=figures.sent_pages,
                    zero_pages=figures.zero_pages,
                    steps=figures.steps,
                    step_bound=figures.step_bound,
                    turns=figures.turns,
                    stolen=figures.stolen,
                    counters=dict(figures.counters),
                    notices=figures.notices,
                )
            )

    def ended_destination(self, received: FiguresOfReceiving, error: BaseException | None = None) -> None:
        """It has come to its end there: well, or by an error, or a cancel."""
        if self.tell is not None:
            outcome = "done"
            if error is not None:
                outcome = "failed" if isinstance(error, Exception) else "cancelled"
            now = perf_counter()
            self.tell(
                Ended(
                    at=now,
                    outcome=outcome,
                    error="" if error is None else str(error),
                    total_time=now - self._begun_at,
                    bytes=received.received_bytes,
                    pages=received.received_pages,
                    zero_pages=received.zero_pages,
                    turns=received.turns,
                )
            )


@cache
def clock() -> str:
    """Which clock this host's times are of: the kernel's boot, as proc(5) names it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return f"{platform.node()}, no boot_id"


@cache
def host() -> Host:
    """This host, and what runs here."""
    return Host(
        name=platform.node(),
        kernel=platform.release(),
        cpus=len(os.sched_getaffinity(0)),
        python=f"{platform.python_version()}, trio {trio.__version__}",
        kvmmig=__version__,
    )
