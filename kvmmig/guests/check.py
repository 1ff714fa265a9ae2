"""What a check of a stopped guest's memory comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of a host's check of a stopped guest."""

    ok: bool
    pages: int  # pages that were compared in full and found right
    passes: int  # times that the guest itself has verified all of them: the least over its vCPUs
    faults: tuple[str, ...]  # the first few things that are wrong
    summary: str  # one line for people
