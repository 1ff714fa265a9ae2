"""When to stop the guest: policies, which see figures only, and the limits that bound everything.

A policy is asked after each round and says what to do next. It knows neither sockets nor pages nor KVM, so
it can be tested, and written, with none of them::

    class Impatient:
        def decide(self, figures: RoundFigures) -> Decision:
            return Stop() if figures.round >= 1 else Continue()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds in seconds. Each holds whatever the other side does."""

    #: One step of sending. A step also ends when the round does.
    step: float = 0.010
    #: Setting up the channel.
    connect: float = 10.0
    #: The other side's answer to the hello; it makes its memory meanwhile. The guest runs.
    setup: float = 60.0
    #: Not one byte accepted for so long ends the migration.
    stall: float = 30.0
    #: The other side's "ready" and its "running", or the disk's word that all is safe. The guest is stopped.
    handover: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFigures:
    """What is known after a round. Rates are bytes a second, times are seconds."""

    round: int  # 0 is the one that sends all of memory
    sent_pages: int
    zero_pages: int
    sent_bytes: int
    duration: float
    dirty_pages: int  # written meanwhile, so owed now
    rate: float
    dirty_rate: float

    @property
    def remaining_bytes(self) -> int:
        """What the guest would be stopped for, if it were stopped now."""
        return self.dirty_pages * PAGE_SIZE

    @property
    def expected_downtime(self) -> float:
        """How long sending that would take at this round's rate."""
        return self.remaining_bytes / self.rate if self.rate else float("inf")


@dataclass(frozen=True, slots=True)
class Continue:
    """Another round with the guest running."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the guest and send the rest."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the migration; the guest goes on here. ``reason`` is a sentence for the user."""

    reason: str


Decision: TypeAlias = Continue | Stop | GiveUp


class Policy(Protocol):
    """Decides after each round. One policy object serves one migration, so it may remember."""

    def decide(self, figures: RoundFigures) -> Decision:
        """What next? Must be quick: it runs on the event loop."""
        ...


@dataclass(frozen=True, slots=True)
class DowntimeLimit:
    """Stop when what is left fits into ``seconds`` at the present rate; the rule of most VMMs."""

    seconds: float = 0.3

    def decide(self, figures: RoundFigures) -> Decision:
        return Stop() if figures.expected_downtime <= self.seconds else Continue()


@dataclass(frozen=True, slots=True)
class MaxRounds:
    """Stop after ``rounds`` rounds, whatever is left: so a guest moves that writes faster than the link."""

    rounds: int = 30

    def decide(self, figures: RoundFigures) -> Decision:
        return Stop() if figures.round + 1 >= self.rounds else Continue()


class FirstOf:
    """Asks several policies, in order; the first that does not say `Continue` is obeyed."""

    def __init__(self, *policies: Policy) -> None:
        self._policies = policies

    def decide(self, figures: RoundFigures) -> Decision:
        for policy in self._policies:
            decision = policy.decide(figures)
            if not isinstance(decision, Continue):
                return decision
        return Continue()


def default_policy() -> Policy:
    """Stop when the expected downtime is at most 300 ms, or after 30 rounds."""
    return FirstOf(DowntimeLimit(), MaxRounds())
