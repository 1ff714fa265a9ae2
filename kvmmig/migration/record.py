"""What a migration notes down of itself while it runs: phases, rounds, times, how long the loop was held."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

from kvmmig import stream
from kvmmig.migration.accounts import Held, Laps, LiveRate, Waits, held_back, run_delay
from kvmmig.migration.phases import may_follow
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.recorder import Recorder
from kvmmig.migration.report import MigrationStatistics, Phase, TimelineEvent
from kvmmig.migration.sendwatch import SendWatch
from kvmmig.migration.stall_meter import Histogram, StallMeter, stolen

_KEPT_EVENTS = 1000
_TELLING = 4 << 20  # bytes of a round that tell how fast the link is


class CountsPages(Protocol):
    """What says how many pages have been put: an encoder, or an image's pages."""

    pages: int
    zero_pages: int


class CountsBytes(Protocol):
    """What says how many bytes have been accepted: a cursor."""

    accepted: int


class Record:
    """Notes what ``put`` and ``cursor`` count. Times are those of `time.perf_counter`."""

    def __init__(
        self,
        put: CountsPages,
        cursor: CountsBytes,
        vcpus: Callable[[], Sequence[int]],
        recorder: Recorder,
    ) -> None:
        """``vcpus`` tells the kernel's ids of the vCPUs' threads."""
        self._recorder = recorder
        #: Watches what is sent; None where nobody wants it recorded.
        self.watch: SendWatch | None = None
        self._vcpus = vcpus
        self._put = put
        self._cursor = cursor
        self._meter = StallMeter(recorder.turn if recorder.tell is not None else None)
        self._started = perf_counter()
        self._ended: float | None = None
        self._stolen: float | None = None
        self._loop_waited: float | None = None
        self._vcpus_waited: float | None = None
        self._held_back: Held | None = None
        self._setup_time: float | None = None
        self._laps: Laps | None = None  # since the guest's stop
        self._downtime: float | None = None
        self._rounds: list[RoundFigures] = []
        self._final: RoundFigures | None = None
        self._live = LiveRate()
        self._link_rate = 0.0
        self._events: deque[TimelineEvent] = deque(maxlen=_KEPT_EVENTS)
        # The round that is being sent: its number, and where the counters stood at its begin.
        self._round = 0
        self._round_started = self._started
        self._sent_before = self._pages_before = self._zeros_before = 0
        self.phase = Phase.SETUP
        #: What sending has waited for.
        self.waits = Waits()
        #: What it writes to keeps it, and is no link.
        self.stores = False
        #: Seconds that a stop is expected to take besides sending.
        self.overhead = 0.0
        #: How long steps took.
        self.steps = Histogram()
        #: What the user should know although it is no error.
        self.notices: tuple[str, ...] = ()
        #: Why it failed.
        self.error = ""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything lies between the begin and the end of this block."""
        self._started = self._round_started = perf_counter()
        loop, vcpus = (threading.get_native_id(),), self._vcpus()
        before = stolen(), run_delay(loop), run_delay(vcpus)
        try:
            with self._meter:
                yield
        finally:
            self._ended = perf_counter()
            self._stolen = stolen() - before[0]
            self._loop_waited = run_delay(loop) - before[1]
            self._vcpus_waited = max(run_delay(vcpus) - before[2], 0.0)  # threads that are gone count for 0
            self._held_back = self._what_held_back(self._loop_waited)

    @property
    def elapsed(self) -> float:
        """Seconds since the begin, until now or the end."""
        return (self._ended if self._ended is not None else perf_counter()) - self._started

    def enter(self, phase: Phase) -> None:
        """The next phase begins: one that the table has a way to."""
        assert phase is self.phase is Phase.SETUP or may_follow(self.phase, phase), (self.phase, phase)
        self.phase = phase
        self.note(str(phase))
        self._recorder.phase(str(phase))

    def note(self, what: str) -> None:
        """Put it into the timeline."""
        self._events.append(TimelineEvent(perf_counter() - self._started, what))

    def set_up(self) -> None:
        """The other side has accepted; memory comes next."""
        self._setup_time = self.elapsed

    def stopping(self) -> None:
        """The guest is about to be stopped."""
        self._laps = Laps()
        self._recorder.stopping()

    def lap(self, what: str) -> None:
        """For what the time since the guest's stop, or since the last call, has gone."""
        assert self._laps is not None
        self._laps.lap(what)
        self._recorder.part(what)

    def gone(self) -> None:
        """The guest runs there, or is safe."""
        assert self._laps is not None
        self._downtime = self._laps.lap("handing over")
        self._recorder.gone()

    @property
    def is_gone(self) -> bool:
        """The guest runs there, or is safe."""
        return self._downtime is not None

    def begin_round(self) -> None:
        """A round begins, or the final pass."""
        self._round = len(self._rounds)
        self._live.begin(self._cursor.accepted)
        self._round_started = perf_counter()
        self._sent_before = self._cursor.accepted
        self._recorder.begin_round()
        self._pages_before, self._zeros_before = self._put.pages, self._put.zero_pages

    def sent_round(self) -> None:
        """All pages of the round have been sent; the dirty log is yet to be read."""
        sent = self._cursor.accepted - self._sent_before
        rate = sent / max(perf_counter() - self._round_started, 1e-9)
        # What a few pages take says little of the link: it is the way into threads and back.
        self._link_rate = rate if sent >= _TELLING else max(rate, self._link_rate)

    def end_round(self, dirty: int, *, bandwidth: float | None, throttle: float) -> RoundFigures:
        """The dirty log was read: ``dirty`` pages were written meanwhile. The others were in force."""
        figures = self._figures(dirty)
        self._rounds.append(figures)
        self._recorder.round(figures, self._round_started, bandwidth, throttle)
        self.note(f"round {figures.round}: {figures.sent_pages} pages sent, {dirty} written meanwhile")
        return figures

    def end_final_pass(self) -> None:
        """All pages have been sent; the guest stands still."""
        self._final = self._figures(0)
        self._recorder.final_pass(self._final, self._round_started)
        self.note(f"final pass: {self._final.sent_pages} pages sent")

    def _figures(self, dirty: int) -> RoundFigures:
        """Time and bytes are those of this one moment."""
        duration = max(perf_counter() - self._round_started, 1e-9)
        sent = self._cursor.accepted - self._sent_before
        return RoundFigures(
            round=self._round,
            sent_pages=self._put.pages - self._pages_before,
            zero_pages=self._put.zero_pages - self._zeros_before,
            sent_bytes=sent,
            duration=duration,
            dirty_pages=dirty,
            rate=sent / duration,
            dirty_rate=dirty * stream.PAGE_SIZE / duration,
            link_rate=self._link_rate,
            overhead=self.overhead,
        )

    def mark(self) -> None:
        """Bytes have been sent."""
        self._live.mark(self._cursor.accepted)

    def _rate(self) -> float:
        if self._ended is None and (rate := self._live.rate(self._cursor.accepted)) is not None:
            return rate
        if self._ended is None and self._rounds:
            return self._rounds[-1].rate
        return self._cursor.accepted / max(self.elapsed - (self._setup_time or 0.0), 1e-9)

    def _what_held_back(self, delayed: float) -> Held:
        first = self._rounds[0].sent_bytes if self._rounds else self._cursor.accepted
        later = self._cursor.accepted - first
        return held_back(
            self.waits, first=first, later=later, delayed=delayed, elapsed=self.elapsed, stores=self.stores
        )

    def statistics(
        self,
        *,
        peer: str,
        total_pages: int,
        remaining_pages: int,
        step_bound: float,
        bandwidth: float | None,
        throttle: float,
        counters: Mapping[str, float],
    ) -> MigrationStatistics:
        """All of it, and what only the migration knows, as it is at this moment."""
        last = self._rounds[-1] if self._rounds else None
        return MigrationStatistics(
            phase=self.phase,
            peer=peer,
            round=self._round,
            total_pages=total_pages,
            remaining_pages=remaining_pages,
            sent_pages=self._put.pages,
            zero_pages=self._put.zero_pages,
            sent_bytes=self._cursor.accepted,
            rate=self._rate(),
            dirty_rate=last.dirty_rate if last is not None else 0.0,
            expected_downtime=last.expected_downtime if last is not None else None,
            downtime=self._downtime,
            setup_time=self._setup_time,
            total_time=self.elapsed,
            step_bound=step_bound,
            steps=self.steps.snapshot(),
            turns=self._meter.turns.snapshot(),
            worst_turn_ran=self._meter.culprit,
            loop_waited=self._loop_waited,
            vcpus_waited=self._vcpus_waited,
            held_back=self._held_back,
            downtime_parts=dict(self._laps.parts) if self._laps is not None else {},
            stolen=self._stolen,
            bandwidth=bandwidth,
            throttle=throttle,
            rounds=tuple(self._rounds),
            final_pass=self._final,
            events=tuple(self._events),
            notices=(*self.notices, *self._recorder.problems),
            error=self.error,
            counters=counters,
        )
