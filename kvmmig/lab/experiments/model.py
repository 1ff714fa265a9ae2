"""The geometric model of pre-copy: what a round sends, the guest has written during the one before.

With memory M, working set W, rate R and dirty rate D: the first round sends M, each later one what was
written in the one before, D times its duration or W at most; so the rounds shrink by D / R. The guest is
stopped when what is left takes no longer than the limit allows. After Clark et al., NSDI 2005, and Liu et
al., HPDC 2011, "Performance and Energy Modeling for Live Migration of Virtual Machines".
"""

from __future__ import annotations

from dataclasses import dataclass

#: Rounds after which the shipped policy stops the guest.
_MOST_ROUNDS = 30


@dataclass(frozen=True)
class Predicted:
    """Seconds, and bytes."""

    total_time: float
    downtime: float
    sent_bytes: float


def predict(
    *, memory: float, working_set: float, rate: float, dirty_rate: float, downtime_limit: float
) -> Predicted:
    """What the model says of one migration: bytes, bytes a second, seconds. ``rate`` is positive."""
    sent = total = 0.0
    left = memory
    for _ in range(_MOST_ROUNDS):
        duration = left / rate
        sent += left
        total += duration
        left = min(working_set, dirty_rate * duration)
        if left / rate <= downtime_limit:
            break
    return Predicted(total_time=total + left / rate, downtime=left / rate, sent_bytes=sent + left)
