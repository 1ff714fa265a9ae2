"""One direction of a stream, as its receiver reads it: where the next bytes belong, and what they meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvmmig.errors import LocalStreamError, StreamError, StreamTruncated, StreamVersion
from kvmmig.stream.format import (
    CHECKED,
    DIGEST,
    FIRST,
    HEADER,
    IDENTITY_SIZE,
    KNOWN_FEATURES,
    MAGIC,
    MAX_FRAME_PAGES,
    MAX_HELLO,
    MAX_NAME,
    MAX_PAGES,
    MAX_RUNS,
    MAX_SECTION,
    MAX_SECTIONS,
    MAX_STATE,
    MAX_TEXT,
    PAGE_DIGESTS,
    PAGE_SIZE,
    PREAMBLE,
    SECTION_HEAD,
    VERSION,
    Checks,
    Direction,
    End,
    Event,
    Fail,
    Hello,
    Kind,
    Pages,
    PagesDone,
    Runs,
    Section,
    Signal,
    StreamState,
    Zeros,
    check_runs,
    digest,
    follow,
)

_T = TypeVar("_T")


class Decoder:
    """Reads one direction of a stream.

    Receive into `buffer()`, any prefix of it, and tell `advance()` how much that was; it returns an event
    where one is complete. After a `Pages` event call `place()` before going on. Every error is a
    `StreamError`, after which the decoder is of no more use.
    """

    def __init__(self, direction: Direction) -> None:
        self._direction = direction
        self.state = StreamState.PREAMBLE
        self._sequence = 0
        self._n_pages = 0
        self._pages = self._zero_pages = self._state_bytes = 0
        self._sections: set[str] = set()
        self._came: npt.NDArray[np.bool_] | None = None  # for each page, once there is a first one
        self._opening = b""  # the preamble but its identity
        #: That of the stream, once it is known.
        self.identity = b""
        self._checks = Checks(b"")
        self.limit_sections(MAX_SECTIONS, MAX_SECTION, MAX_STATE)
        #: Bytes taken so far: where in the stream an error is.
        self.position = 0
        self._header: tuple[Kind, StreamState, int, int] | None = None
        self._head = b""
        self._want: list[memoryview] = [memoryview(bytearray(PREAMBLE.size))]
        self._scratch = self._want[0]
        self._placing = 0
        self._placed: Sequence[memoryview] = ()
        self._digests = False
        self._digest = b""

    @property
    def finished(self) -> bool:
        """All that this direction can say has been said."""
        return self.state is StreamState.CLOSED

    def limit_sections(self, count: int, largest: int, total: int) -> None:
        """From here on refuse, when it begins, a section too many or one that is too large.

        ``largest`` bytes are for the data of one section, ``total`` for all of them.
        """
        self._most_sections, self._largest_section, self._most_state = count, largest, total

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
            self._expect(HEADER.size)
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
                f"the stream ends after {self.position} bytes, {self.state.value}; it is not whole"
            )

    def _check_placed(self) -> None:
        if self._digests and digest(self._placed) != self._digest:
            raise StreamError(f"the pages before byte {self.position} are damaged: their digest is wrong")
        self._placing, self._placed = 0, ()

    def _expect(self, count: int) -> None:
        self._scratch = memoryview(bytearray(count))
        self._want = [self._scratch]

    def _complete(self, data: bytes) -> Event | None:
        if self.state is StreamState.PREAMBLE:
            if not self._opening:
                self._take_preamble(data)
                self._expect(IDENTITY_SIZE)
            else:
                self.identity = data
                self._checks = Checks(self._opening + data)
                self.state = FIRST[self._direction]
                self._expect(HEADER.size)
            return None
        if self._header is None:
            in_scratch = self._take_header(data)
            if in_scratch:
                self._expect(in_scratch)
                return None
            data = b""
        return self._take_body(data)

    def _take_preamble(self, data: bytes) -> None:
        magic, version, direction = PREAMBLE.unpack(data)
        if magic != MAGIC:
            raise StreamError("this is not a kvmmig stream: it does not begin with the word kvmmig")
        if version != VERSION:
            raise StreamVersion(
                f"the stream has version {version}; this kvmmig speaks version {VERSION}. "
                "Use the kvmmig that wrote it, or one of the same version on both sides"
            )
        if direction != self._direction:
            raise StreamError("the stream runs in the wrong direction; is the other side a destination too?")
        self._opening = data

    def _take_header(self, data: bytes) -> int:
        """Check a header; returns how much of the body belongs into the scratch buffer."""
        number, zero, lane, runs, sequence, length, check = HEADER.unpack(data)
        at = f"at byte {self.position - HEADER.size}"
        try:
            kind = Kind(number)
        except ValueError:
            raise StreamVersion(f"the stream has a frame of the unknown kind {number} {at}") from None
        if sequence != self._sequence:
            raise StreamError(f"frame {self._sequence} should follow {at}, but this is frame {sequence}")
        if zero or lane:
            raise StreamVersion(f"the {kind.name} frame {at} uses fields that version {VERSION} leaves zero")
        following = follow(self.state, kind, StreamError)
        if kind in (Kind.PAGES, Kind.ZEROS):
            table = runs * 16 + (DIGEST.size if self._digests and kind is Kind.PAGES else 0)
            most = table + (MAX_FRAME_PAGES * PAGE_SIZE if kind is Kind.PAGES else 0)
            if not 0 < runs <= MAX_RUNS or not table <= length <= most:
                raise StreamError(f"the {kind.name} frame {at} claims {runs} runs in {length} bytes")
            in_scratch = table
        else:
            if runs or length > self._most_bytes(kind):
                raise StreamError(f"the {kind.name} frame {at} claims {length} bytes; that is too many")
            in_scratch = length
        self._sequence += 1
        self._header = (kind, following, length, check)
        self._head = data[:CHECKED]
        return int(in_scratch)

    def _most_bytes(self, kind: Kind) -> int:
        match kind:
            case Kind.HELLO:
                return MAX_HELLO
            case Kind.SECTION:
                if len(self._sections) >= self._most_sections:
                    raise StreamError(f"the stream has more than {self._most_sections} state sections")
                room = min(self._largest_section, self._most_state - self._state_bytes)
                return SECTION_HEAD.size + MAX_NAME + room
        return MAX_TEXT

    def _take_body(self, body: bytes) -> Event | None:
        assert self._header is not None
        kind, following, length, check = self._header
        self._header = None
        if self._checks.of(self._head, body) != check:
            raise StreamError(
                f"the {kind.name} frame before byte {self.position} is damaged, or of another stream: "
                "its check is wrong"
            )
        event = self._event(kind, body, length)
        self._checks.note(check)
        self.state = following
        if isinstance(event, Pages):
            self._placing = event.n_pages * PAGE_SIZE
            self._want = []
        elif self.finished:
            self._want = []
        else:
            self._expect(HEADER.size)
        return event

    def _event(self, kind: Kind, body: bytes, length: int) -> Event:
        match kind:
            case Kind.HELLO:
                return self._hello(body)
            case Kind.PAGES:
                if self._digests:
                    body, self._digest = body[: -DIGEST.size], body[-DIGEST.size :]
                    length -= DIGEST.size
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
        if unknown := sorted(set(hello.features) - KNOWN_FEATURES):
            raise StreamVersion(
                f"the stream uses {', '.join(unknown)}, which this kvmmig does not know; "
                "use the same version of kvmmig on both sides"
            )
        self._digests = PAGE_DIGESTS in hello.features
        if not 0 < hello.n_pages <= MAX_PAGES:
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
        if self._came is None:
            self._came = np.zeros(self._n_pages, np.bool_)
        for first, count in runs.tolist():
            self._came[first : first + count] = True
        return runs, int(runs[:, 1].sum())

    def _section(self, body: bytes) -> Section:
        if len(body) < SECTION_HEAD.size:
            raise StreamError("a SECTION frame is too short for its own head")
        size, zero, version = SECTION_HEAD.unpack_from(body)
        name = body[SECTION_HEAD.size : SECTION_HEAD.size + size]
        data = body[SECTION_HEAD.size + size :]
        if zero or not 0 < size <= MAX_NAME or len(name) != size or len(data) > self._largest_section:
            raise StreamError("a SECTION frame does not fit its own head")
        try:
            section = Section(name.decode(), version, data)
        except UnicodeDecodeError:
            raise StreamError(f"a state section's name is not text: {name!r}") from None
        if section.name in self._sections:
            raise StreamError(f"the state section {section.name!r} is there twice")
        self._sections.add(section.name)
        self._state_bytes += len(data)
        return section

    def _end(self, body: bytes) -> End:
        end = _json(body, End)
        mine = (self._pages, self._zero_pages, len(self._sections))
        theirs = (end.pages, end.zero_pages, end.sections)
        if mine != theirs:
            raise StreamError(
                "the stream is not whole: the source counted {} pages, {} zero pages and {} sections, "
                "but {}, {} and {} came".format(*theirs, *mine)
            )
        if end.digest != self._checks.digest:
            raise StreamError("the stream is not what the source sent: the digest over its frames is wrong")
        came = 0 if self._came is None else int(np.count_nonzero(self._came))
        if missing := self._n_pages - came:
            raise StreamError(
                f"the stream is not whole: {missing} of the guest's {self._n_pages} pages never came, "
                "neither as data nor as zero"
            )
        return end


def _json(body: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise StreamError(f"a {type_.__name__.upper()} frame can't be read: {problem}") from problem
