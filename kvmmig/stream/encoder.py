"""One direction of a stream, as its sender makes it: what the engine wants to say, as buffers."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from kvmmig.errors import LocalStreamError
from kvmmig.stream.format import (
    FIRST,
    HEADER,
    IDENTITY_SIZE,
    MAGIC,
    MAX_NAME,
    MAX_SECTION,
    MAX_TEXT,
    PAGE_DIGESTS,
    PAGE_SIZE,
    PREAMBLE,
    SECTION_HEAD,
    VERSION,
    Checks,
    Direction,
    End,
    Hello,
    Kind,
    Runs,
    Section,
    StreamState,
    check_runs,
    digest,
    follow,
)


class Encoder:
    """Makes one direction of a stream. `LocalStreamError` when the caller breaks the protocol."""

    def __init__(self, direction: Direction, *, lane: int = 0, identity: bytes | None = None) -> None:
        """``identity`` is 16 bytes that no other stream has; random ones if it is not given."""
        self._direction = direction
        self._lane = lane
        identity = os.urandom(IDENTITY_SIZE) if identity is None else identity
        #: The stream's.
        self.identity = identity
        self._preamble = PREAMBLE.pack(MAGIC, VERSION, direction) + identity
        self._checks = Checks(self._preamble)
        self.state = StreamState.PREAMBLE
        self._sequence = 0
        self._n_pages = 0
        self._digests = False
        self.pages = 0
        self.zero_pages = 0
        self.sections = 0

    def preamble(self) -> bytes:
        """The first bytes of every stream."""
        if self.state is not StreamState.PREAMBLE:
            raise LocalStreamError(f"a preamble can't be sent when the stream is {self.state.value}")
        self.state = FIRST[self._direction]
        return self._preamble

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
            Kind.SECTION, SECTION_HEAD.pack(len(name), 0, section.version) + name + section.data
        )

    def end(self, *, running: bool) -> bytes:
        """The END frame, with all that this encoder has counted, and its digest."""
        totals = End(self.pages, self.zero_pages, self.sections, running, self._checks.digest)
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
        self.state = follow(self.state, kind, LocalStreamError)
        length = len(body) + extra
        blank = HEADER.pack(kind, 0, self._lane, runs, self._sequence, length, 0)
        check = self._checks.of(blank, body)
        self._checks.note(check)
        head = HEADER.pack(kind, 0, self._lane, runs, self._sequence, length, check)
        self._sequence += 1
        return head + body
