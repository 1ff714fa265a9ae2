"""For the authors of transports and of tests: the conformance suite and the fakes.

The suite needs no pytest; see `kvmmig.testing.conformance`.
"""

from kvmmig.testing.conformance import (
    CHECKS,
    CLOGGED_CHECKS,
    STORED_CHECKS,
    STREAM_CHECKS,
    Check,
    Ends,
    Maker,
    Nonconformance,
    stored_ends,
    stream_ends,
)
from kvmmig.testing.memory import MemoryChannel, memory_channel_pair

__all__ = [
    "CHECKS",
    "CLOGGED_CHECKS",
    "STORED_CHECKS",
    "STREAM_CHECKS",
    "Check",
    "Ends",
    "Maker",
    "MemoryChannel",
    "Nonconformance",
    "memory_channel_pair",
    "stored_ends",
    "stream_ends",
]
