"""When to stop the guest: policies, which see figures only, and the limits that bound everything.

A policy is asked after each round and says what to do next. It knows neither sockets nor pages nor KVM, so
it can be tested, and written, with none of them::

    class Impatient(Policy):
        def decide(self, figures: RoundFigures) -> Decision:
            return Stop() if figures.round >= 1 else Continue()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvmmig.units import BOUND, STEP, parse_bandwidth

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds, in seconds where nothing else is said. Each holds whatever the other side does."""

    #: One step of sending. A step also ends when the round does.
    step: float = 0.010
    #: Setting up the channel.
    connect_timeout: float = 10.0
    #: The other side's answer to the hello, which it gives before it makes memory. The guest runs. On a
    #: destination: a client's hello, and the first of its guest.
    setup_timeout: float = 60.0
    #: Not one byte accepted for so long ends the migration. On a destination: not one that comes.
    stall_timeout: float = 30.0
    #: The other side's "ready" and its "running", or the disk's word that all is safe. The guest is stopped.
    #: On a destination: the source's "go".
    handover_timeout: float = 60.0
    #: The whole migration; None is no limit.
    timeout: float | None = None
    #: What to do then: give the guest back, or stop it and finish anyway.
    on_timeout: Literal["cancel", "force"] = "cancel"
    #: The most bytes a second; None is no limit. It can be changed while the migration runs.
    bandwidth: float | None = None
    #: Check pages on links too, and not only on what may be a disk: each is copied, and has a digest.
    page_digests: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for what can be no bound."""
        STEP.check(self.step, "the step of Limits")
        for name in ("connect_timeout", "setup_timeout", "stall_timeout", "handover_timeout", "timeout"):
            seconds = getattr(self, name)
            if seconds is not None or name != "timeout":
                BOUND.check(seconds, f"the {name} of Limits")
        parse_bandwidth(self.bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """What is known after a round. Rates are bytes a second, times are seconds."""

    round: int  # 0 is the one that sends all of memory
    sent_pages: int  # with their bytes
    zero_pages: int  # only said to be zero
    sent_bytes: int  # accepted by the channel
    duration: float
    dirty_pages: int  # written meanwhile, so pending now
    rate: float  # sent bytes by duration
    dirty_rate: float  # dirty pages' bytes by duration: a page that is written twice counts once
    link_rate: float = 0.0  # how fast pages went while they were sent, in the last round that had many
    overhead: float = 0.0  # what a stop takes besides sending, as far as that is known

    @property
    def remaining_bytes(self) -> int:
        """What the guest would be stopped for, if it were stopped now."""
        return self.dirty_pages * PAGE_SIZE

    @property
    def expected_downtime(self) -> float:
        """How long the guest would stand still: sending that at the link's rate, and the overhead."""
        if not self.remaining_bytes:
            return self.overhead
        rate = self.link_rate or self.rate
        return self.overhead + (self.remaining_bytes / rate if rate else float("inf"))


@dataclass(frozen=True, slots=True)
class Continue:
    """Another round with the guest running."""

    #: Send at most so many bytes a second from here on; None leaves it as it is.
    bandwidth: float | None = None
    #: Keep the vCPUs from running for this share (0 to 0.99) of the time; None leaves it as it is.
    throttle: float | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the guest and send the rest."""

    #: Send at most so many bytes a second from here on; None leaves it as it is.
    bandwidth: float | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the migration; the guest goes on here. ``reason`` is a sentence for the user."""

    reason: str


Decision: TypeAlias = Continue | Stop | GiveUp


class Policy(ABC):
    """Decides after each round. One policy object serves one migration, so it may remember."""

    def start(self) -> Continue | Stop:
        """How to begin: with rounds while the guest runs, or without any."""
        return Continue()

    @abstractmethod
    def decide(self, figures: RoundFigures) -> Decision:
        """What next? Must be quick: it runs on the event loop."""


class DowntimeLimit(Policy):
    """Stop when what is left fits into ``seconds`` at the present rate; the rule of most VMMs."""

    def __init__(self, seconds: float = 0.3) -> None:
        #: May be changed while the migration runs.
        self.seconds = seconds

    def decide(self, figures: RoundFigures) -> Decision:
        return Stop() if figures.expected_downtime <= self.seconds else Continue()


class MaxRounds(Policy):
    """Stop after ``rounds`` rounds, whatever is left: so a guest moves that writes faster than the link."""

    def __init__(self, rounds: int = 30) -> None:
        self.rounds = rounds

    def decide(self, figures: RoundFigures) -> Decision:
        return Stop() if figures.round + 1 >= self.rounds else Continue()


class NoProgress(Policy):
    """Stop when the rounds no longer shrink: after ``patience`` of them that left no less than the best.

    A guest whose working set is rewritten faster than it can be sent is not helped by more rounds.
    """

    def __init__(self, patience: int = 3, shrink: float = 0.95) -> None:
        self.patience = patience
        #: A round makes progress when it leaves less than this share of what the best one left.
        self.shrink = shrink
        self._best = float("inf")
        self._idle = 0

    def decide(self, figures: RoundFigures) -> Decision:
        if figures.dirty_pages < self._best * self.shrink:
            self._best, self._idle = figures.dirty_pages, 0
        else:
            self._idle += 1
        return Stop() if self._idle >= self.patience else Continue()


class Saving(Policy):
    """For what is only stored: few live rounds, so that it is whole soon, and small.

    Stops when what is left fits into ``seconds``, when a round leaves more than half of what it has sent,
    after ``rounds`` rounds, and when what is sent again would be more than half of the first round.
    """

    def __init__(self, seconds: float = 0.3, rounds: int = 4) -> None:
        #: May be changed while the migration runs.
        self.seconds = seconds
        self.rounds = rounds
        self._first = 0
        self._again = 0

    def decide(self, figures: RoundFigures) -> Decision:
        if figures.round == 0:
            self._first = figures.sent_bytes
        else:
            self._again += figures.sent_bytes
        left = figures.remaining_bytes
        done = figures.expected_downtime <= self.seconds or figures.round + 1 >= self.rounds
        large = 2 * (self._again + left) > self._first or 2 * left > figures.sent_bytes
        return Stop() if done or large else Continue()


class Stopped(Policy):
    """No live round at all: the guest stands still from the beginning, and no page is sent twice."""

    def start(self) -> Stop:
        return Stop()

    def decide(self, figures: RoundFigures) -> Decision:
        return Stop()


class RateAdaptive(Policy):
    """Rate-adaptive pre-copy: each round is sent at the last round's dirty rate plus 50 Mbit/s.

    It begins at ``minimum`` bytes a second, and stops the guest when the rate would go above ``maximum`` or
    when less than 256 KiB are left. The final pass is sent at ``maximum``. After Clark et al., "Live
    Migration of Virtual Machines", NSDI 2005, section 5.3; they used 100 Mbit/s and 500 Mbit/s.
    """

    INCREMENT = 50e6 / 8
    SMALL = 256 << 10

    def __init__(self, minimum: float = 100e6 / 8, maximum: float = 500e6 / 8) -> None:
        self.minimum = minimum
        self.maximum = maximum

    def start(self) -> Continue:
        return Continue(bandwidth=self.minimum)

    def decide(self, figures: RoundFigures) -> Decision:
        wanted = figures.dirty_rate + self.INCREMENT
        if wanted > self.maximum or figures.remaining_bytes < self.SMALL:
            return Stop(bandwidth=self.maximum)
        return Continue(bandwidth=max(wanted, self.minimum))


class AutoConverge(Policy):
    """Slow the guest down until the rounds shrink: its vCPUs stand still for a growing share of the time.

    After every two rounds that left more than half of what they had sent, the share grows: ``first`` at the
    first time, ``step`` more each time, up to ``most``. The engine undoes it when the migration ends.
    """

    def __init__(self, first: float = 0.2, step: float = 0.1, most: float = 0.99) -> None:
        self.first = first
        self.step = step
        self.most = most
        #: The share of time that the vCPUs stand still now.
        self.share = 0.0
        self._bad = 0

    def decide(self, figures: RoundFigures) -> Decision:
        if figures.remaining_bytes * 2 <= figures.sent_bytes:
            return Continue()
        self._bad += 1
        if self._bad < 2:
            return Continue()
        self._bad = 0
        self.share = min(self.share + self.step, self.most) if self.share else self.first
        return Continue(throttle=self.share)


class FirstOf(Policy):
    """Asks several policies, in order. The first that wants to stop or to give up is obeyed.

    While all go on, what they say of bandwidth and of throttling holds; the first one's word comes first.
    """

    def __init__(self, *policies: Policy) -> None:
        self.policies = policies

    def start(self) -> Continue | Stop:
        beginnings = [policy.start() for policy in self.policies]
        for beginning in beginnings:
            if isinstance(beginning, Stop):
                return beginning
        return _merged([beginning for beginning in beginnings if isinstance(beginning, Continue)])

    def decide(self, figures: RoundFigures) -> Decision:
        decisions = [policy.decide(figures) for policy in self.policies]  # all see all rounds
        for decision in decisions:
            if not isinstance(decision, Continue):
                return decision
        return _merged([decision for decision in decisions if isinstance(decision, Continue)])


def _merged(wishes: list[Continue]) -> Continue:
    bandwidths = [wish.bandwidth for wish in wishes if wish.bandwidth is not None]
    throttles = [wish.throttle for wish in wishes if wish.throttle is not None]
    return Continue(bandwidths[0] if bandwidths else None, throttles[0] if throttles else None)


def default_policy(*, stores: bool = False) -> Policy:
    """Stop when the expected downtime is at most 300 ms, or after 30 rounds; a transport that ``stores`` goes
    by `Saving`."""
    return Saving() if stores else FirstOf(DowntimeLimit(), MaxRounds())
