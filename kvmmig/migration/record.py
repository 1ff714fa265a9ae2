"""What a migration notes down of itself while it runs: phases, rounds, times, how long the loop was held."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

from kvmmig import stream
from kvmmig.migration.phases import may_follow
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.recorder import Recorder
from kvmmig.migration.report import MigrationStatistics, Phase, TimelineEvent
from kvmmig.migration.stall_meter import Histogram, StallMeter, stolen
from kvmmig.stream import Cursor

_KEPT_EVENTS = 1000


class Record:
    """Counts what ``encoder`` and ``cursor`` have sent. Times are those of `time.perf_counter`."""

    def __init__(self, encoder: stream.Encoder, cursor: Cursor, recorder: Recorder) -> None:
        self._encoder = encoder
        self._cursor = cursor
        self._recorder = recorder
        self._meter = StallMeter(recorder.turn if recorder.tell is not None else None)
        self._started = perf_counter()
        self._ended: float | None = None
        self._stolen: float | None = None
        self._setup_time: float | None = None
        self._stopped_at: float | None = None
        self._downtime: float | None = None
        self._rounds: list[RoundFigures] = []
        self._events: deque[TimelineEvent] = deque(maxlen=_KEPT_EVENTS)
        # The round that is being sent: its number, and where the counters stood at its begin.
        self._round = 0
        self._round_started = self._started
        self._sent_before = self._pages_before = self._zeros_before = 0
        self.phase = Phase.SETUP
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
        stolen_before = stolen()
        try:
            with self._meter:
                yield
        finally:
            self._ended = perf_counter()
            self._stolen = stolen() - stolen_before

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
        self._stopped_at = perf_counter()
        self._recorder.stopping()

    def gone(self) -> None:
        """The guest runs there, or is safe."""
        assert self._stopped_at is not None
        self._downtime = perf_counter() - self._stopped_at
        self._recorder.gone()

    @property
    def is_gone(self) -> bool:
        """The guest runs there, or is safe."""
        return self._downtime is not None

    def begin_round(self) -> None:
        """A round begins."""
        self._round = len(self._rounds)
        self._round_started = perf_counter()
        self._sent_before = self._cursor.accepted
        self._recorder.begin_round()
        self._pages_before, self._zeros_before = self._encoder.pages, self._encoder.zero_pages

    def end_round(self, dirty: int, rate: float, *, bandwidth: float | None, throttle: float) -> RoundFigures:
        """A round was sent at ``rate`` (see `rate`), and ``dirty`` pages were written meanwhile.

        ``bandwidth`` and ``throttle`` are what was in force.
        """
        duration = perf_counter() - self._round_started
        figures = RoundFigures(
            round=self._round,
            sent_pages=self._encoder.pages - self._pages_before,
            zero_pages=self._encoder.zero_pages - self._zeros_before,
            sent_bytes=self._cursor.accepted - self._sent_before,
            duration=duration,
            dirty_pages=dirty,
            rate=rate if rate or not self._rounds else self._rounds[-1].rate,
            dirty_rate=dirty * stream.PAGE_SIZE / duration,
        )
        self._rounds.append(figures)
        self._recorder.round(figures, self._round_started, bandwidth, throttle)
        self.note(f"round {figures.round}: {figures.sent_pages} pages sent, {dirty} written meanwhile")
        return figures

    def end_final_pass(self) -> None:
        """The last pages and the machine's state were sent, since the last `begin_round`."""
        self._recorder.final_pass(
            self._round,
            self._round_started,
            pages=self._encoder.pages - self._pages_before,
            zeros=self._encoder.zero_pages - self._zeros_before,
            sent_bytes=self._cursor.accepted - self._sent_before,
        )

    def rate(self) -> float:
        """Bytes a second since the begin of this round, or of the final pass."""
        now = self._ended if self._ended is not None else perf_counter()
        return (self._cursor.accepted - self._sent_before) / max(now - self._round_started, 1e-9)

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
        more_notices: tuple[str, ...],
    ) -> MigrationStatistics:
        """All of it, and what only the migration knows, as it is at this moment."""
        last = self._rounds[-1] if self._rounds else None
        return MigrationStatistics(
            phase=self.phase,
            peer=peer,
            round=self._round,
            total_pages=total_pages,
            remaining_pages=remaining_pages,
            sent_pages=self._encoder.pages,
            zero_pages=self._encoder.zero_pages,
            sent_bytes=self._cursor.accepted,
            rate=last.rate if last is not None else self.rate(),
            dirty_rate=last.dirty_rate if last is not None else 0.0,
            expected_downtime=last.expected_downtime if last is not None else None,
            downtime=self._downtime,
            setup_time=self._setup_time,
            total_time=self.elapsed,
            step_bound=step_bound,
            steps=self.steps.snapshot(),
            turns=self._meter.turns.snapshot(),
            worst_turn_ran=self._meter.culprit,
            stolen=self._stolen,
            bandwidth=bandwidth,
            throttle=throttle,
            rounds=tuple(self._rounds),
            events=tuple(self._events),
            notices=(*self.notices, *more_notices),
            error=self.error,
            counters=counters,
        )
