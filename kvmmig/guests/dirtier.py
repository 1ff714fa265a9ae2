"""The dirtier seen from the host: may it be built like that, and is a stopped one's memory what it must be?

All constants here are those of dirtier.asm, which says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmmig.errors import BadConfig
from kvmmig.guests.check import Check
from kvmmig.guests.patterns import C1 as C1
from kvmmig.guests.patterns import C3 as C3
from kvmmig.guests.patterns import PATTERNS, Pattern
from kvmmig.machine.memory import HOLE, PAGE_SIZE, GuestMemory
from kvmmig.units import format_size

C2 = 0xC2B2AE3D27D4EB4F
STEP = 0xD6E8FEB86659FD93
MAGIC = 0x7265697472696421
STATUS = 0x101000
STATUS_SIZE = 64
BOUNDARY = 0x200000
LAPS_A_PASS = 16

_BLOCK = 512  # pages that are checked at a time: long enough to leave the GIL alone, short enough for a cache
_FAULTS = 8

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Share:
    """The pages of one vCPU. ``first`` is a page number in RAM order, where the hole does not count."""

    vcpu: int
    first: int
    pages: int
    hot: int
    stride: int
    pattern: int

    def gfns(self, start: int, end: int) -> Words:
        """Guest-physical address / 4096 of the share's pages from index ``start`` up to ``end``."""
        return gfns(np.arange(self.first + start, self.first + end, dtype=np.uint64))


@dataclass(frozen=True, slots=True)
class Status:
    """What a vCPU says of itself in its status block."""

    pages: int
    filled: int
    progress: int  # steps
    laps: int
    failures: int


def validate(*, memory: int, cpus: int, parameters: Mapping[str, int]) -> None:
    """Raise `BadConfig` unless a dirtier with these parameters fits into ``memory`` bytes."""
    missing = [name for name in ("hot", "stride") if name not in parameters]
    if missing:
        raise BadConfig(f"dirtier: the parameter {missing[0]!r} is missing; it needs hot and stride")
    hot, stride = parameters["hot"], parameters["stride"]
    if stride < 1:
        raise BadConfig(
            f"dirtier: stride={stride} is no stride; use 1 for every page, 2 for every second one"
        )
    if parameters.get("pattern", 0) not in PATTERNS:
        raise BadConfig(f"dirtier: there is no pattern {parameters['pattern']}; use 0 to {max(PATTERNS)}")
    if hot < 0 or hot % PAGE_SIZE:
        raise BadConfig(f"dirtier: hot={hot} is not a whole number of pages; use a multiple of {PAGE_SIZE}")
    if memory < 2 * BOUNDARY:
        raise BadConfig(
            f"dirtier: {format_size(memory)} of memory are too little; give it {format_size(2 * BOUNDARY)}"
        )
    for share in shares(memory=memory, cpus=cpus, parameters=parameters):
        if share.hot and (share.hot - 1) * stride >= share.pages:
            most = share.pages // stride * cpus * PAGE_SIZE
            raise BadConfig(
                f"dirtier: hot={format_size(hot)} with stride={stride} does not fit into "
                f"{format_size(memory)} of memory and {cpus} vCPU{'s' * (cpus > 1)}, of which the first "
                f"{format_size(BOUNDARY)} are not used; use more memory, a smaller stride, or at most "
                f"hot={most // 1024}KiB"
            )


def shares(*, memory: int, cpus: int, parameters: Mapping[str, int]) -> tuple[Share, ...]:
    """How the pages are dealt out to the vCPUs."""
    owned, hot = (memory - BOUNDARY) // PAGE_SIZE, parameters["hot"] // PAGE_SIZE
    dealt = []
    for vcpu in range(cpus):
        start, end = (owned * i // cpus for i in (vcpu, vcpu + 1))
        hot_start, hot_end = (hot * i // cpus for i in (vcpu, vcpu + 1))
        first = BOUNDARY // PAGE_SIZE + start
        pattern = parameters.get("pattern", 0)  # a guest that was saved before there was another than 0
        dealt.append(Share(vcpu, first, end - start, hot_end - hot_start, parameters["stride"], pattern))
    return tuple(dealt)


def gfns(pages: Words) -> Words:
    """Page numbers in RAM order to guest-physical page numbers: RAM beyond 3 GiB goes on at 4 GiB."""
    low, high = (np.uint64(edge // PAGE_SIZE) for edge in HOLE)
    return pages + np.where(pages >= low, high - low, np.uint64(0))


def contents(frames: Words, generations: Words, out: Words, scratch: Words) -> Words:
    """All words of the pages ``frames`` (guest-physical numbers), shape ``(n, 512)``, put into ``out``."""
    z = frames * np.uint64(C1) + generations * np.uint64(C2) + np.uint64(C3)
    np.add(z[:, None], _STEPS[None, :], out=out)
    np.right_shift(out, np.uint64(32), out=scratch)
    return np.bitwise_xor(out, scratch, out=out)


_STEPS: Words = np.arange(PAGE_SIZE // 8, dtype=np.uint64) * np.uint64(STEP)


def check(memory: GuestMemory, *, cpus: int, parameters: Mapping[str, int]) -> Check:
    """Compare every page of a stopped dirtier with what its status blocks say that it must hold.

    Blocking, with the GIL released nearly all the time, so it can run beside an event loop; needs some 5 MiB
    of its own. Raises `BadConfig` for parameters that no dirtier can have.
    """
    validate(memory=memory.size, cpus=cpus, parameters=parameters)
    faults: list[str] = []
    right = wrong = 0
    passes: list[int] = []
    for share in shares(memory=memory.size, cpus=cpus, parameters=parameters):
        status = read_status(memory, share, faults)
        if status is None:
            wrong += share.pages
            continue
        passes.append(status.laps // LAPS_A_PASS)
        bad = 0
        for fault in _wrong_pages(memory, share, status):
            bad += 1
            if len(faults) < _FAULTS:
                faults.append(fault)
        right, wrong = right + share.pages - bad, wrong + bad
    least = min(passes, default=0)
    if faults:
        summary = f"dirtier: {wrong} of {right + wrong} pages are wrong: {faults[0]}"
    else:
        summary = f"dirtier: all {right} pages are right after {least} passes"
    return Check(not faults, right, least, tuple(faults), summary)


def read_status(memory: GuestMemory, share: Share, faults: list[str]) -> Status | None:
    """A vCPU's status block; None, and a fault, if it is nonsense. All zero is a vCPU that has not begun."""
    block = memory.read(STATUS + STATUS_SIZE * share.vcpu, STATUS_SIZE)
    magic, *words = np.frombuffer(block, np.uint64).tolist()
    status = Status(*words[:5])
    if not any(block):
        return status
    nonsense = ""
    if magic != MAGIC:
        nonsense = f"begins with {magic:#x} and not with {MAGIC:#x}"
    elif status.pages != share.pages:
        nonsense = f"tells of {status.pages} pages, and this vCPU has {share.pages}"
    elif status.filled > share.pages or (status.filled < share.pages and status.progress):
        nonsense = f"tells of {status.filled} filled pages and {status.progress} steps"
    if nonsense:
        faults.append(f"vcpu {share.vcpu}: its status block {nonsense}")
        return None
    if status.failures:
        faults.append(f"vcpu {share.vcpu} has itself found {status.failures} wrong")
    return status


def _wrong_pages(memory: GuestMemory, share: Share, status: Status) -> Iterator[str]:
    """A sentence for each page that does not hold what it must."""
    # The page that the vCPU was busy with: each word may be as before or as after.
    pattern: Pattern | None = None
    busy = -1
    if status.filled < share.pages:
        busy = status.filled
    elif share.hot:
        pattern = PATTERNS[share.pattern](share.hot, status.progress)
        busy = -1 if pattern.next is None else pattern.next * share.stride

    shape = (_BLOCK, PAGE_SIZE // 8)
    whole, scratch = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    differs = np.empty(shape, np.bool_)
    for start in range(0, share.pages, _BLOCK):
        end = min(start + _BLOCK, share.pages)
        n = end - start
        generations = _generations(share, pattern, start, end)
        frames = share.gfns(start, end)
        expected = contents(frames, generations, whole[:n], scratch[:n])
        expected[max(status.filled - start, 0) :] = 0
        found = memory.words[share.first + start : share.first + end]
        np.not_equal(expected, found, out=differs[:n])
        if start <= busy < end:
            row = busy - start
            after = generations[row : row + 1] + np.uint64(status.filled == share.pages)
            later = contents(frames[row : row + 1], after, scratch[:1], scratch[1:2])
            differs[row] &= found[row] != later[0]
        if not differs[:n].any():
            continue
        for row in np.flatnonzero(differs[:n].any(axis=1)).tolist():
            word = int(np.argmax(differs[row]))
            yield (
                f"vcpu {share.vcpu} page {int(frames[row]):#x} word {word}: "
                f"expected {int(expected[row, word]):#x}, found {int(found[row, word]):#x}"
            )


def _generations(share: Share, pattern: Pattern | None, start: int, end: int) -> Words:
    index = np.arange(start, end, dtype=np.uint64)
    generations = np.zeros_like(index)
    if pattern is not None and start < share.hot * share.stride:
        k, off = np.divmod(index, np.uint64(share.stride))
        hot = (off == 0) & (k < np.uint64(share.hot))
        generations[hot] = pattern.generations(k[hot])
    return generations
