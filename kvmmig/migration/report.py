"""What a migration says of itself: frozen figures, and a timeline of what happened when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmmig.migration.accounts import Held
from kvmmig.migration.phases import Phase as Phase
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.stall_meter import Durations
from kvmmig.units import format_duration, format_rate, format_size


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """Something that happened ``at`` so many seconds after the migration's start."""

    at: float
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatistics:
    """The figures of one migration, at one moment; times in seconds, rates in bytes a second."""

    phase: Phase  # where it is
    peer: str  # who is at the other end, and whose process that is, where it is on this host
    round: int  # 0 is the first; the final pass counts on
    total_pages: int  # of the guest
    remaining_pages: int  # pending: not yet accepted
    sent_pages: int  # with their bytes; a page counts each time
    zero_pages: int  # found to be zero: only said, not sent
    sent_bytes: int  # accepted by the channel
    rate: float  # of the last second or less, while pages are sent; at the end, of all of it
    dirty_rate: float  # of the last round
    expected_downtime: float | None  # when the policy decided to stop; before that, as of the last round
    downtime: float | None  # from the guest's stop to its start there (one-way: to the commit)
    setup_time: float | None  # from the start to the first round
    total_time: float  # from the start until now, or to the end
    step_bound: float  # what a step may take
    steps: Durations  # what they took
    turns: Durations  # of the event loop: how long it did not poll
    worst_turn_ran: str  # the task that ran longest in the worst turn
    loop_waited: float | None  # for so long the loop's thread wanted to run and had no CPU; at the end
    vcpus_waited: float | None  # the same of the vCPUs' threads, the sum over all of them; at the end
    held_back: Held | None  # what made it take as long as it did; at the end
    downtime_parts: Mapping[str, float]  # what the downtime was made of so far, in order
    stolen: float | None  # for so long this host's own hypervisor kept its CPUs from running; at the end
    bandwidth: float | None  # the limit as it is now; None is no limit
    throttle: float  # the share of time that the vCPUs are kept from running
    rounds: tuple[RoundFigures, ...]  # those that have ended
    final_pass: RoundFigures | None  # what was sent while the guest stood still; None before it has been
    events: tuple[TimelineEvent, ...]  # the newest 1000
    notices: tuple[str, ...]  # what the user should know although it is no error
    error: str  # why it failed, one sentence; empty otherwise
    #: What the channel counts itself, such as bytes on the wire after compression.
    counters: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst_stall(self) -> float:
        """The longest turn of the event loop: for so long nothing else was answered."""
        return self.turns.worst

    @property
    def surprise(self) -> str:
        """Why the downtime was not as expected: a clause. Empty where it was, to within 20 %."""
        last, final = self.rounds[-1] if self.rounds else None, self.final_pass
        if self.downtime is None or self.expected_downtime is None or last is None or final is None:
            return ""
        beyond = self.downtime - self.expected_downtime
        if abs(beyond) <= 0.2 * self.expected_downtime:
            return ""
        most = max(self.downtime_parts, key=lambda part: self.downtime_parts[part])
        if abs(final.duration - (self.expected_downtime - last.overhead)) < abs(beyond) / 2:
            return f"{most}: {format_duration(self.downtime_parts[most])}"
        grown = final.sent_bytes - last.remaining_bytes
        if grown > 0.2 * last.remaining_bytes:
            return f"the guest wrote {format_size(grown)} more before it stood still"
        if grown < -0.2 * last.remaining_bytes:
            return f"{format_size(-grown)} less were sent, as pages that are zero are only said"
        then, before = format_rate(final.rate), format_rate(last.link_rate)
        return f"the last pages went at {then}, those before them at {before}"
