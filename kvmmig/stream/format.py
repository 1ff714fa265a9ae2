"""The stream codec: bytes to events and back, and nothing else.

Sans I/O: it imports neither trio nor KVM. The `Encoder` turns what the engine wants to say into buffers; the
`Decoder` says where the next bytes belong and, once they are there, what they meant. Guest pages pass
through without being copied: the encoder takes views of guest memory, and the decoder asks for the place
where a frame's pages belong and lets them be received straight into it.

A stream, forwards (source to destination) and backwards (destination to source, on two-way channels)::

    forwards    preamble HELLO (PAGES | ZEROS)* (SECTION | PAGES | ZEROS)* END GO
    backwards   preamble ACCEPT READY RUNNING
    either      FAIL, anywhere: the sender gives up and says why

It begins with a preamble of 32 bytes: ``"kvmmig\\r\\n"``, the version, the direction, and the stream's
identity, 16 random bytes. Then frames: a header of 32 bytes, and a body. All numbers are little-endian::

    kind u8 | 0 u8 | lane u16 | runs u32 | sequence u64 | length u64 | check u64

``length`` counts the bytes behind the header. The body of PAGES is a table of ``runs`` rows (first page u64,
count u64), with the feature `PAGE_DIGESTS` an XXH3 u64 of the pages, and then the pages themselves; of ZEROS
the table alone; of the others what their class says. Pages are numbered in RAM order, over the regions that
the hello names.

``check`` is an XXH3 of the header before it and of all of the body but the pages, seeded by the XXH3 of the
preamble: so a frame of one stream is wrong in every other. The pages may be live memory, which changes while
it is sent; only a stable copy can have a digest, which the check covers. END carries a digest over the checks
of all frames before it, and each page must have come by then, as data or as zero.

Everything that comes in is checked before it is used: each length has a cap and is compared to it before
anything is allocated; page numbers lie inside the guest; frames are counted, so a lost or a repeated one is
found; what may follow what is a table.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvmmig.errors import StreamError

VERSION = 2
MAGIC = b"kvmmig\r\n"
PAGE_SIZE = 4096

#: The most pages of a guest: 64 GiB, as much as a machine can have. A receiver keeps a byte for each.
MAX_PAGES = 1 << 24
#: The most pages in one frame, 16 MiB: what a lane commits to before it can say something else, and what a
#: receiver clears or scatters in one go on its event loop.
MAX_FRAME_PAGES = 4096
#: The most rows in one table. It bounds what a receiver must hold: 16 KiB.
MAX_RUNS = 1024
#: A hello with the CPUID of a large machine is some 10 KiB.
MAX_HELLO = 1 << 20
#: Bounds of the machine state for a receiver that knows no better (see `Decoder.limit_sections`): bytes of
#: one section, how many there are, and their bytes in all.
MAX_SECTION = 1 << 20
MAX_SECTIONS = 4096
MAX_STATE = 16 << 20
MAX_TEXT = 4096
MAX_NAME = 255

#: A feature: each PAGES frame carries a digest of its pages, so that no damage to them goes unnoticed.
PAGE_DIGESTS = "page-digests"
KNOWN_FEATURES = frozenset({PAGE_DIGESTS})

PREAMBLE = struct.Struct("<8sII")
IDENTITY_SIZE = 16
HEADER = struct.Struct("<BBHIQQQ")
CHECKED = 24  # so many bytes of a header come before its check, and are covered by it
SECTION_HEAD = struct.Struct("<HHI")
DIGEST = struct.Struct("<Q")

Runs: TypeAlias = npt.NDArray[np.int64]


class Direction(enum.IntEnum):
    """Which half of the conversation a stream is."""

    FORWARDS = 0
    BACKWARDS = 1


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    PAGES = 2
    ZEROS = 3
    SECTION = 4
    END = 5
    GO = 6
    ACCEPT = 7
    READY = 8
    RUNNING = 9
    FAIL = 10


class StreamState(enum.Enum):
    """Where a stream is; the same table serves both ends."""

    PREAMBLE = "before its preamble"
    HELLO = "before its hello"
    MEMORY = "in its memory"
    STATE = "in its machine state"
    END = "behind its end"
    CLOSED = "over"
    ACCEPT = "before the accept"
    READY = "before ready"
    RUNNING = "before running"


# What may come where, and where it leads.
NEXT: Mapping[StreamState, Mapping[Kind, StreamState]] = {
    StreamState.HELLO: {Kind.HELLO: StreamState.MEMORY},
    StreamState.MEMORY: {
        Kind.PAGES: StreamState.MEMORY,
        Kind.ZEROS: StreamState.MEMORY,
        Kind.SECTION: StreamState.STATE,
    },
    # Capturing state may write guest memory (a device flushing into it), so pages may still follow.
    StreamState.STATE: {
        Kind.SECTION: StreamState.STATE,
        Kind.PAGES: StreamState.STATE,
        Kind.ZEROS: StreamState.STATE,
        Kind.END: StreamState.END,
    },
    StreamState.END: {Kind.GO: StreamState.CLOSED},
    StreamState.ACCEPT: {Kind.ACCEPT: StreamState.READY},
    StreamState.READY: {Kind.READY: StreamState.RUNNING},
    StreamState.RUNNING: {Kind.RUNNING: StreamState.CLOSED},
}
FIRST = {Direction.FORWARDS: StreamState.HELLO, Direction.BACKWARDS: StreamState.ACCEPT}


class Hello(msgspec.Struct, frozen=True):
    """The first frame: how large the guest is, what the stream uses, and the machine's own description."""

    n_pages: int
    machine: msgspec.Raw  # JSON that this codec does not look into
    features: tuple[str, ...] = ()  # what the stream uses beyond version 2; an unknown one is refused by name


class End(msgspec.Struct, frozen=True):
    """The last frame before the hand-over: what the source counted, and whether the guest ran."""

    pages: int
    zero_pages: int
    sections: int
    running: bool
    digest: str  # of all frames before this one: see `Checks`


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages follow: call `Decoder.place` with the buffers that they belong in."""

    runs: Runs
    n_pages: int


@dataclass(frozen=True, slots=True)
class PagesDone:
    """All pages of the last `Pages` are in their place."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """These pages are all zero."""

    runs: Runs
    n_pages: int


@dataclass(frozen=True, slots=True)
class Section:
    """A named, versioned piece of machine state."""

    name: str
    version: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Signal:
    """A frame without a body: `Kind.GO`, `Kind.ACCEPT`, `Kind.READY` or `Kind.RUNNING`."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Fail:
    """The other side gives up; ``text`` is its sentence."""

    text: str


Event: TypeAlias = Hello | Pages | PagesDone | Zeros | Section | End | Signal | Fail


class Checks:
    """The checks of one stream's frames, in order, and the digest over all of them so far."""

    def __init__(self, preamble: bytes) -> None:
        """``preamble`` with the identity."""
        self._seed = xxhash.xxh3_64_intdigest(preamble)
        self._whole = xxhash.xxh3_128(preamble)

    def of(self, head: bytes, body: bytes) -> int:
        """A frame's check: over the first `CHECKED` bytes of its header, and its body but for pages."""
        hasher = xxhash.xxh3_64(head[:CHECKED], seed=self._seed)
        hasher.update(body)
        return hasher.intdigest()

    def note(self, check: int) -> None:
        """A frame with this check has been sent, or has come."""
        self._whole.update(DIGEST.pack(check))

    @property
    def digest(self) -> str:
        """The XXH3-128 of the preamble and of what was noted, in hexadecimal."""
        return self._whole.hexdigest()


def digest(data: Sequence[memoryview]) -> bytes:
    """The XXH3 of all these bytes, as it stands in a frame."""
    hasher = xxhash.xxh3_64()
    for buffer in data:
        hasher.update(buffer)
    return DIGEST.pack(hasher.intdigest())


def check_runs(runs: Runs, n_pages: int) -> str:
    """What is wrong with a table of runs, or an empty text."""
    if not 0 < len(runs) <= MAX_RUNS:
        return f"it has {len(runs)} runs; 1 to {MAX_RUNS} are right"
    first, count = runs[:, 0], runs[:, 1]
    if (count <= 0).any() or (first < 0).any() or ((first + count) > n_pages).any():
        return f"it names pages outside the guest's {n_pages}"
    if (first[1:] < (first + count)[:-1]).any():
        return "its runs overlap or are out of order"
    if int(count.sum()) > MAX_FRAME_PAGES:
        return f"it names {int(count.sum())} pages; at most {MAX_FRAME_PAGES} are right"
    return ""


def follow(state: StreamState, kind: Kind, error: type[StreamError]) -> StreamState:
    if kind is Kind.FAIL and state not in (StreamState.PREAMBLE, StreamState.CLOSED):
        return StreamState.CLOSED
    following = NEXT.get(state, {}).get(kind)
    if following is None:
        raise error(f"a {kind.name} frame is out of place: the stream is {state.value}")
    return following
