"""For the authors of transports and of tests: the conformance suite and the fakes.

The suite needs no pytest; see `kvmmig.testing.conformance`. `plans`, for `check_plan`, needs hypothesis.
"""

from kvmmig.testing._ends import (
    Check,
    Ends,
    Maker,
    Nonconformance,
    stream_ends,
    transport_ends,
)
from kvmmig.testing.conformance import CHECKS, CLOGGED_CHECKS, RANDOM_ACCESS_CHECKS, checks_for
from kvmmig.testing.leftovers import leftovers
from kvmmig.testing.memory import MemoryChannel, MemoryTransport, memory_channel_pair
from kvmmig.testing.plans import Call, Plan, check_plan, plans

__all__ = [
    "CHECKS",
    "CLOGGED_CHECKS",
    "RANDOM_ACCESS_CHECKS",
    "Call",
    "Check",
    "Ends",
    "Maker",
    "MemoryChannel",
    "MemoryTransport",
    "Nonconformance",
    "Plan",
    "check_plan",
    "checks_for",
    "leftovers",
    "memory_channel_pair",
    "plans",
    "stream_ends",
    "transport_ends",
]
