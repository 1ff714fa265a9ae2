"""The stream codec: bytes to events and back, and nothing else.

Sans I/O: it imports neither trio nor KVM. The `Encoder` turns what the engine wants to say into buffers; the
`Decoder` says where the next bytes belong and, once they are there, what they meant. Guest pages pass
through without being copied: the encoder takes views of guest memory, and the decoder asks for the place
where a frame's pages belong and lets them be received straight into it.

A stream, forwards (source to destination) and backwards (destination to source, on two-way channels)::

    forwards    preamble HELLO (PAGES | ZEROS)* (SECTION | PAGES | ZEROS)* END GO
    backwards   preamble ACCEPT READY RUNNING
    either      FAIL, anywhere: the sender gives up and says why

It begins with a preamble of 16 bytes: ``"kvmmig\\r\\n"``, the version, the direction. Then frames: a header
of 32 bytes, and a body. All numbers are little-endian::

    kind u8 | 0 u8 | lane u16 | runs u32 | sequence u64 | length u64 | crc32 u32 | 0 u32

``length`` counts the bytes behind the header. The body of PAGES is a table of ``runs`` rows (first page u64,
count u64), with the feature `PAGE_DIGESTS` an XXH3 u64 of the pages, and then the pages themselves; of ZEROS
the table alone; of the others what their class says. The CRC covers the header (as if it were 0 there) and
all of the body but the pages: those may be live memory, which changes while it is sent. Only a stable copy
can have a digest. Pages are numbered in RAM order, over the regions that the hello names.

Everything that comes in is checked before it is used: each length has a cap and is compared to it before
anything is allocated; page numbers lie inside the guest; frames are counted, so a lost or a repeated one is
found; what may follow what is a table.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvmmig.errors import LocalStreamError, StreamError, StreamTruncated, StreamVersion

VERSION = 1
MAGIC = b"kvmmig\r\n"
PAGE_SIZE = 4096

#: The most pages in one frame, 16 MiB: what a lane commits to before it can say something else, and what a
#: receiver clears or scatters in one go on its event loop.
MAX_FRAME_PAGES = 4096
#: The most rows in one table. It bounds what a receiver must hold: 16 KiB.
MAX_RUNS = 1024
#: A hello with the CPUID of a large machine is some 10 KiB.
MAX_HELLO = 1 << 20
#: The largest piece of state known is a LAPIC or an XSAVE area of a few KiB.
MAX_SECTION = 1 << 20
MAX_SECTIONS = 4096
MAX_TEXT = 4096
MAX_NAME = 255

#: A feature: each PAGES frame carries a digest of its pages, so that no damage to them goes unnoticed.
PAGE_DIGESTS = "page-digests"
_KNOWN_FEATURES = frozenset({PAGE_DIGESTS})

_PREAMBLE = struct.Struct("<8sII")
_HEADER = struct.Struct("<BBHIQQII")
_SECTION_HEAD = struct.Struct("<HHI")
_DIGEST = struct.Struct("<Q")

Runs: TypeAlias = npt.NDArray[np.int64]

_T = TypeVar("_T")


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


class Phase(enum.Enum):
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
_NEXT: Mapping[Phase, Mapping[Kind, Phase]] = {
    Phase.HELLO: {Kind.HELLO: Phase.MEMORY},
    Phase.MEMORY: {
        Kind.PAGES: Phase.MEMORY,
        Kind.ZEROS: Phase.MEMORY,
        Kind.SECTION: Phase.STATE,
    },
    # Capturing state may write guest memory (a device flushing into it), so pages may still follow.
    Phase.STATE: {
        Kind.SECTION: Phase.STATE,
        Kind.PAGES: Phase.STATE,
        Kind.ZEROS: Phase.STATE,
        Kind.END: Phase.END,
    },
    Phase.END: {Kind.GO: Phase.CLOSED},
    Phase.ACCEPT: {Kind.ACCEPT: Phase.READY},
    Phase.READY: {Kind.READY: Phase.RUNNING},
    Phase.RUNNING: {Kind.RUNNING: Phase.CLOSED},
}
_FIRST = {Direction.FORWARDS: Phase.HELLO, Direction.BACKWARDS: Phase.ACCEPT}
_CAPS = {Kind.HELLO: MAX_HELLO, Kind.SECTION: MAX_SECTION + MAX_NAME + _SECTION_HEAD.size}


class Hello(msgspec.Struct, frozen=True):
    """The first frame: how large the guest is, what the stream uses, and the machine's own description."""

    n_pages: int
    machine: msgspec.Raw  # JSON that this codec does not look into
    features: tuple[str, ...] = ()  # what the stream uses beyond version 1; an unknown one is refused by name


class End(msgspec.Struct, frozen=True):
    """The last frame before the hand-over: what the source counted, and whether the guest ran."""

    pages: int
    zero_pages: int
    sections: int
    running: bool


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


class Encoder:
    """Makes one direction of a stream. `LocalStreamError` when the caller breaks the protocol."""

    def __init__(self, direction: Direction, *, lane: int = 0) -> None:
        self._direction = direction
        self._lane = lane
        self.phase = Phase.PREAMBLE
        self._sequence = 0
        self._n_pages = 0
        self._digests = False
        self.pages = 0
        self.zero_pages = 0
        self.sections = 0

    def preamble(self) -> bytes:
        """The first bytes of every stream."""
        if self.phase is not Phase.PREAMBLE:
            raise LocalStreamError(f"a preamble can't be sent when the stream is {self.phase.value}")
        self.phase = _FIRST[self._direction]
        return _PREAMBLE.pack(MAGIC, VERSION, self._direction)

    def hello(self, n_pages: int, machine: bytes, features: Sequence[str] = ()) -> bytes:
        """``machine`` is a JSON object; the codec carries it as it is."""
        self._n_pages = n_pages
        self._digests = PAGE_DIGESTS in features
        return self._frame(
            Kind.HELLO, msgspec.json.encode(Hello(n_pages, msgspec.Raw(machine), tuple(features)))
        )

    def page_runs(self, runs: Runs, data: Sequence[memoryview], known: bytes = b"") -> list[memoryview]:
        """A PAGES frame: its header and table, then ``data`` itself, uncopied.

        ``data`` holds the pages of all runs in order; how it is cut into buffers does not matter. With
        `PAGE_DIGESTS` it must not change any more; ``known`` is its `digest`, where that is there already.
        """
        count = self._check_runs(runs)
        length = sum(buffer.nbytes for buffer in data)
        if length != count * PAGE_SIZE:
            raise LocalStreamError(f"a frame of {count} pages was given {length} bytes")
        table = runs.astype("<u8").tobytes()
        if self._digests:
            table += known or digest(data)
        head = self._frame(Kind.PAGES, table, runs=len(runs), extra=length)
        self.pages += count
        return [memoryview(head), *data]

    def zero_runs(self, runs: Runs) -> bytes:
        """A ZEROS frame."""
        self.zero_pages += self._check_runs(runs)
        return self._frame(Kind.ZEROS, runs.astype("<u8").tobytes(), runs=len(runs))

    def section(self, section: Section) -> bytes:
        """A SECTION frame: name length u16, 0 u16, version u32, the name, the data."""
        name = section.name.encode()
        if not 0 < len(name) <= MAX_NAME or len(section.data) > MAX_SECTION:
            raise LocalStreamError(
                f"the state section {section.name!r} of {len(section.data)} bytes is too large"
            )
        self.sections += 1
        return self._frame(
            Kind.SECTION, _SECTION_HEAD.pack(len(name), 0, section.version) + name + section.data
        )

    def end(self, *, running: bool) -> bytes:
        """The END frame, with all that this encoder has counted."""
        totals = End(self.pages, self.zero_pages, self.sections, running)
        return self._frame(Kind.END, msgspec.json.encode(totals))

    def signal(self, kind: Kind) -> bytes:
        """GO, ACCEPT, READY or RUNNING."""
        return self._frame(kind, b"")

    def fail(self, text: str) -> bytes:
        """FAIL: allowed anywhere behind the preamble; the stream is over."""
        return self._frame(Kind.FAIL, text.encode()[:MAX_TEXT])

    def _check_runs(self, runs: Runs) -> int:
        problem = check_runs(runs, self._n_pages)
        if problem:
            raise LocalStreamError(f"a table of pages can't be sent: {problem}")
        return int(runs[:, 1].sum())

    def _frame(self, kind: Kind, body: bytes, *, runs: int = 0, extra: int = 0) -> bytes:
        self.phase = _follow(self.phase, kind, LocalStreamError)
        length = len(body) + extra
        blank = _HEADER.pack(kind, 0, self._lane, runs, self._sequence, length, 0, 0)
        crc = zlib.crc32(body, zlib.crc32(blank))
        head = _HEADER.pack(kind, 0, self._lane, runs, self._sequence, length, crc, 0)
        self._sequence += 1
        return head + body


class Decoder:
    """Reads one direction of a stream.

    Receive into `buffer()`, any prefix of it, and tell `advance()` how much that was; it returns an event
    where one is complete. After a `Pages` event call `place()` before going on. Every error is a
    `StreamError`, after which the decoder is of no more use.
    """

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self.phase = Phase.PREAMBLE
        self._sequence = 0
        self._n_pages = 0
        self._pages = self._zero_pages = self._sections = 0
        #: Bytes taken so far: where in the stream an error is.
        self.position = 0
        self._header: tuple[Kind, Phase, int, int] | None = None
        self._head = b""
        self._want: list[memoryview] = [memoryview(bytearray(_PREAMBLE.size))]
        self._scratch = self._want[0]
        self._placing = 0
        self._placed: Sequence[memoryview] = ()
        self._digests = False
        self._digest = b""

    @property
    def finished(self) -> bool:
        """All that this direction can say has been said."""
        return self.phase is Phase.CLOSED

    def buffer(self) -> memoryview:
        """Where the next bytes belong; empty only when the stream is over or `place` is due."""
        return self._want[0] if self._want else memoryview(b"")

    def advance(self, count: int) -> Event | None:
        """``count`` bytes have been put into `buffer`."""
        self.position += count
        rest = self._want[0][count:]
        if rest.nbytes:
            self._want[0] = rest
            return None
        self._want.pop(0)
        if self._want:
            return None
        if self._placing:
            self._check_placed()
            self._expect(_HEADER.size)
            return PagesDone()
        return self._complete(bytes(self._scratch))

    def place(self, buffers: Sequence[memoryview]) -> None:
        """Where the pages of the last `Pages` event belong, in order: exactly so many bytes."""
        length = sum(buffer.nbytes for buffer in buffers)
        if not self._placing or self._want or length != self._placing:
            raise LocalStreamError(f"{length} bytes of room were offered where {self._placing} are needed")
        self._want = [buffer for buffer in buffers if buffer.nbytes]
        self._placed = tuple(self._want)

    def end_of_stream(self) -> None:
        """The bytes have ended. `StreamTruncated` unless they may end here."""
        if not self.finished:
            raise StreamTruncated(
                f"the stream ends after {self.position} bytes, {self.phase.value}; it is not whole"
            )

    def _check_placed(self) -> None:
        if self._digests and digest(self._placed) != self._digest:
            raise StreamError(f"the pages before byte {self.position} are damaged: their digest is wrong")
        self._placing, self._placed = 0, ()

    def _expect(self, count: int) -> None:
        self._scratch = memoryview(bytearray(count))
        self._want = [self._scratch]

    def _complete(self, data: bytes) -> Event | None:
        if self.phase is Phase.PREAMBLE:
            self._take_preamble(data)
            self._expect(_HEADER.size)
            return None
        if self._header is None:
            in_scratch = self._take_header(data)
            if in_scratch:
                self._expect(in_scratch)
                return None
            data = b""
        return self._take_body(data)

    def _take_preamble(self, data: bytes) -> None:
        magic, version, direction = _PREAMBLE.unpack(data)
        if magic != MAGIC:
            raise StreamError("this is not a kvmmig stream: it does not begin with the word kvmmig")
        if version != VERSION:
            raise StreamVersion(f"the stream has version {version}; this kvmmig speaks version {VERSION}")
        if direction != self._direction:
            raise StreamError("the stream runs in the wrong direction; is the other side a destination too?")
        self.phase = _FIRST[self._direction]

    def _take_header(self, data: bytes) -> int:
        """Check a header; returns how much of the body belongs into the scratch buffer."""
        number, zero, lane, runs, sequence, length, crc, zero2 = _HEADER.unpack(data)
        at = f"at byte {self.position - _HEADER.size}"
        try:
            kind = Kind(number)
        except ValueError:
            raise StreamVersion(f"the stream has a frame of the unknown kind {number} {at}") from None
        if sequence != self._sequence:
            raise StreamError(f"frame {self._sequence} should follow {at}, but this is frame {sequence}")
        if zero or zero2 or lane:
            raise StreamVersion(f"the {kind.name} frame {at} uses fields that version {VERSION} leaves zero")
        following = _follow(self.phase, kind, StreamError)
        if kind in (Kind.PAGES, Kind.ZEROS):
            table = runs * 16 + (_DIGEST.size if self._digests and kind is Kind.PAGES else 0)
            most = table + (MAX_FRAME_PAGES * PAGE_SIZE if kind is Kind.PAGES else 0)
            if not 0 < runs <= MAX_RUNS or not table <= length <= most:
                raise StreamError(f"the {kind.name} frame {at} claims {runs} runs in {length} bytes")
            in_scratch = table
        else:
            if runs or length > _CAPS.get(kind, MAX_TEXT):
                raise StreamError(f"the {kind.name} frame {at} claims {length} bytes; that is too many")
            in_scratch = length
        self._sequence += 1
        self._header = (kind, following, length, crc)
        self._head = data[:24] + bytes(8)
        return int(in_scratch)

    def _take_body(self, body: bytes) -> Event | None:
        assert self._header is not None
        kind, following, length, crc = self._header
        self._header = None
        if zlib.crc32(body, zlib.crc32(self._head)) != crc:
            raise StreamError(
                f"the {kind.name} frame before byte {self.position} is damaged: its CRC is wrong"
            )
        event = self._event(kind, body, length)
        self.phase = following
        if isinstance(event, Pages):
            self._placing = event.n_pages * PAGE_SIZE
            self._want = []
        elif self.finished:
            self._want = []
        else:
            self._expect(_HEADER.size)
        return event

    def _event(self, kind: Kind, body: bytes, length: int) -> Event:
        match kind:
            case Kind.HELLO:
                return self._hello(body)
            case Kind.PAGES:
                if self._digests:
                    body, self._digest = body[: -_DIGEST.size], body[-_DIGEST.size :]
                    length -= _DIGEST.size
                runs, count = self._table(kind, body)
                if length - len(body) != count * PAGE_SIZE:
                    raise StreamError(
                        f"a PAGES frame names {count} pages but carries {length - len(body)} bytes"
                    )
                self._pages += count
                return Pages(runs, count)
            case Kind.ZEROS:
                runs, count = self._table(kind, body)
                self._zero_pages += count
                return Zeros(runs, count)
            case Kind.SECTION:
                return self._section(body)
            case Kind.END:
                return self._end(body)
            case Kind.FAIL:
                return Fail(body.decode(errors="replace"))
            case _:
                if body:
                    raise StreamError(f"a {kind.name} frame carries {len(body)} bytes; it should carry none")
                return Signal(kind)

    def _hello(self, body: bytes) -> Hello:
        hello = _json(body, Hello)
        if unknown := sorted(set(hello.features) - _KNOWN_FEATURES):
            raise StreamVersion(
                f"the stream uses {', '.join(unknown)}, which this kvmmig does not know; "
                "use the same version of kvmmig on both sides"
            )
        self._digests = PAGE_DIGESTS in hello.features
        if hello.n_pages <= 0:
            raise StreamError(f"the hello names a guest of {hello.n_pages} pages")
        self._n_pages = hello.n_pages
        return hello

    def _table(self, kind: Kind, body: bytes) -> tuple[Runs, int]:
        raw = np.frombuffer(body, "<u8").reshape(-1, 2)
        if (raw > np.uint64(1 << 52)).any():
            raise StreamError(f"a {kind.name} frame names pages outside the guest")
        runs = raw.astype(np.int64)
        problem = check_runs(runs, self._n_pages)
        if problem:
            raise StreamError(f"a {kind.name} frame before byte {self.position} is wrong: {problem}")
        return runs, int(runs[:, 1].sum())

    def _section(self, body: bytes) -> Section:
        if len(body) < _SECTION_HEAD.size:
            raise StreamError("a SECTION frame is too short for its own head")
        size, zero, version = _SECTION_HEAD.unpack_from(body)
        name = body[_SECTION_HEAD.size : _SECTION_HEAD.size + size]
        data = body[_SECTION_HEAD.size + size :]
        if zero or not 0 < size <= MAX_NAME or len(name) != size or len(data) > MAX_SECTION:
            raise StreamError("a SECTION frame does not fit its own head")
        self._sections += 1
        if self._sections > MAX_SECTIONS:
            raise StreamError(f"the stream has more than {MAX_SECTIONS} state sections")
        try:
            return Section(name.decode(), version, data)
        except UnicodeDecodeError:
            raise StreamError(f"a state section's name is not text: {name!r}") from None

    def _end(self, body: bytes) -> End:
        end = _json(body, End)
        mine = (self._pages, self._zero_pages, self._sections)
        theirs = (end.pages, end.zero_pages, end.sections)
        if mine != theirs:
            raise StreamError(
                "the stream is not whole: the source counted {} pages, {} zero pages and {} sections, "
                "but {}, {} and {} came".format(*theirs, *mine)
            )
        return end


def digest(data: Sequence[memoryview]) -> bytes:
    """The XXH3 of all these bytes, as it stands in a frame."""
    hasher = xxhash.xxh3_64()
    for buffer in data:
        hasher.update(buffer)
    return _DIGEST.pack(hasher.intdigest())


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


def _follow(phase: Phase, kind: Kind, error: type[StreamError]) -> Phase:
    if kind is Kind.FAIL and phase not in (Phase.PREAMBLE, Phase.CLOSED):
        return Phase.CLOSED
    following = _NEXT.get(phase, {}).get(kind)
    if following is None:
        raise error(f"a {kind.name} frame is out of place: the stream is {phase.value}")
    return following


def _json(body: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as problem:
        raise StreamError(f"a {type_.__name__.upper()} frame can't be read: {problem}") from problem
