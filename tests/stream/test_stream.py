"""The codec: what goes in comes out, and nothing else does."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmig import stream
from kvmmig.errors import LocalStreamError, StreamError, StreamTruncated, StreamVersion
from kvmmig.stream import Decoder, Direction, Encoder, Event, Kind
from kvmmig.stream.format import HEADER, SECTION_HEAD, Checks

N_PAGES = 64
IDENTITY = bytes(range(16))


def runs(*pairs: tuple[int, int]) -> stream.Runs:
    return np.array(pairs, np.int64).reshape(-1, 2)


def decode(data: bytes, split: Callable[[int], int] = lambda room: room) -> list[Event]:
    """Feed ``data`` in pieces of ``split(room)`` bytes; pages come out as (runs, bytes)."""
    decoder = Decoder(Direction.FORWARDS)
    events: list[Event] = []
    at = 0
    while at < len(data) and not decoder.finished:
        room = decoder.buffer()
        size = max(1, min(len(room), len(data) - at, split(len(room))))
        room[:size] = data[at : at + size]
        at += size
        event = decoder.advance(size)
        if isinstance(event, stream.Pages):
            decoder.place([memoryview(bytearray(count * 4096)) for _, count in event.runs.tolist()])
        if event is not None:
            events.append(event)
    if not decoder.finished:
        decoder.end_of_stream()
    return events


def whole_stream(features: tuple[str, ...] = ()) -> tuple[bytes, list[int]]:
    """One valid stream, and where its frames begin."""
    encoder = Encoder(Direction.FORWARDS, identity=IDENTITY)
    page = memoryview(bytes(range(256)) * 16)
    parts = [
        encoder.preamble(),
        encoder.hello(N_PAGES, b'{"name":"guest"}', features),
        b"".join(encoder.page_runs(runs((0, 2), (5, 1)), [page, page, page])),
        encoder.zero_runs(runs((2, 3), (6, N_PAGES - 6))),
        encoder.section(stream.Section("cpu0/regs", 1, b"registers")),
        b"".join(encoder.page_runs(runs((7, 1)), [page])),
        encoder.end(running=True),
        encoder.signal(Kind.GO),
    ]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    return b"".join(parts), starts


STREAM, STARTS = whole_stream()
SEALED, _ = whole_stream((stream.PAGE_DIGESTS,))


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


ALL = ["Hello", "Pages", "PagesDone", "Zeros", "Section", "Pages", "PagesDone", "End", "Signal"]


def test_a_stream_comes_out_whole() -> None:
    events = decode(STREAM)
    assert kinds(events) == ALL
    hello, pages, _, zeros, section, _, _, end, go = events
    assert isinstance(hello, stream.Hello)
    assert bytes(hello.machine) == b'{"name":"guest"}'
    assert isinstance(pages, stream.Pages)
    assert pages.runs.tolist() == [[0, 2], [5, 1]]
    assert isinstance(zeros, stream.Zeros)
    assert zeros.n_pages == 61
    assert section == stream.Section("cpu0/regs", 1, b"registers")
    assert isinstance(end, stream.End)
    assert (end.pages, end.zero_pages, end.sections, end.running) == (4, 61, 1, True)
    assert go == stream.Signal(Kind.GO)


def test_a_stream_comes_out_whole_byte_by_byte() -> None:
    assert kinds(decode(STREAM, lambda room: 1)) == ALL


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_a_stream_comes_out_whole_however_it_is_cut(sizes: list[int]) -> None:
    at = itertools.cycle(sizes)
    assert kinds(decode(STREAM, lambda room: next(at))) == ALL


def test_pages_are_put_where_they_were_asked_to() -> None:
    decoder = Decoder(Direction.FORWARDS)
    memory = bytearray(N_PAGES * 4096)
    at = 0
    while not decoder.finished:
        room = decoder.buffer()
        room[:] = STREAM[at : at + len(room)]
        at += len(room)
        event = decoder.advance(len(room))
        if isinstance(event, stream.Pages):
            view = memoryview(memory)
            decoder.place([view[f * 4096 : (f + c) * 4096] for f, c in event.runs.tolist()])
    filled = [p for p in range(N_PAGES) if memory[p * 4096 : (p + 1) * 4096] == bytes(range(256)) * 16]
    assert filled == [0, 1, 5, 7]


@pytest.mark.parametrize(
    "cut", sorted({1, 15, 16, *STARTS[1:-1], *(s + 1 for s in STARTS[:-1]), len(STREAM) - 1})
)
def test_a_stream_that_ends_early_is_truncated(cut: int) -> None:
    with pytest.raises(StreamTruncated, match=f"ends after {cut} bytes"):
        decode(STREAM[:cut])


@pytest.mark.parametrize("frame", range(1, 7))
def test_a_frame_that_is_lost_or_repeated_is_found(frame: int) -> None:
    a, b = STARTS[frame], STARTS[frame + 1]
    with pytest.raises(StreamError):
        decode(STREAM[:a] + STREAM[b:])
    with pytest.raises(StreamError):
        decode(STREAM[:b] + STREAM[a:b] + STREAM[b:])


def test_a_page_that_is_lost_from_a_frame_is_found() -> None:
    a = STARTS[2] + 32 + 32
    with pytest.raises(StreamError):
        decode(STREAM[:a] + STREAM[a + 4096 :])


@settings(max_examples=300)
@given(st.data())
def test_any_damage_outside_the_pages_is_a_stream_error(data: st.DataObject) -> None:
    pages = [range(STARTS[2] + 64, STARTS[3]), range(STARTS[5] + 48, STARTS[6])]
    at = data.draw(st.integers(0, len(STREAM) - 1).filter(lambda i: not any(i in area for area in pages)))
    damaged = bytearray(STREAM)
    damaged[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StreamError):
        decode(bytes(damaged))


def mutations(stream: bytes) -> st.SearchStrategy[bytes]:
    """Streams that differ from this one: a byte changed, a part cut out, repeated, moved, or replaced."""
    size = len(stream)
    spans = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)

    def change(at: int, flip: int) -> bytes:
        return stream[:at] + bytes([stream[at] ^ flip]) + stream[at + 1 :]

    return st.one_of(
        st.builds(change, st.integers(0, size - 1), st.integers(1, 255)),
        spans.map(lambda s: stream[: s[0]] + stream[s[1] :]),
        spans.map(lambda s: stream[: s[1]] + stream[s[0] :]),
        st.builds(lambda s, to: stream[:to] + stream[s[0] : s[1]] + stream[to:], spans, st.integers(0, size)),
        st.builds(lambda s, new: stream[: s[0]] + new + stream[s[1] :], spans, st.binary(max_size=100)),
    ).filter(lambda mutant: mutant != stream)


def check_mutant(mutant: bytes) -> None:
    """A typed error, or the very guest that was sent; never a hang, a crash, or a large allocation."""
    tracemalloc.start()
    try:
        events = decode(mutant)
    except StreamError:
        pass
    else:
        # All that was meant to come has come; what follows behind "go" belongs to nobody.
        assert kinds(events) == ALL
        assert mutant.startswith(SEALED)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 << 20


@settings(max_examples=500)
@given(mutations(SEALED))
def test_any_mutation_of_a_stream_with_digests_is_an_error_or_the_same_guest(mutant: bytes) -> None:
    check_mutant(mutant)


@pytest.mark.slow
@settings(max_examples=100_000, suppress_health_check=list(HealthCheck))
@given(mutations(SEALED))
def test_a_hundred_thousand_mutations_are_errors_or_the_same_guest(mutant: bytes) -> None:
    check_mutant(mutant)


@settings(max_examples=300)
@given(st.binary(max_size=300), st.integers(0, len(STREAM)))
def test_garbage_anywhere_is_a_stream_error_and_allocates_little(garbage: bytes, at: int) -> None:
    tracemalloc.start()
    try:
        decode(STREAM[:at] + garbage + bytes(50_000))
    except StreamError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20 << 20


def forged(kind: int, body: bytes, *, run_count: int = 0, length: int | None = None, lane: int = 0) -> bytes:
    """A frame behind a preamble and a hello, its check right, whatever it says."""
    size = len(body) if length is None else length
    blank = HEADER.pack(kind, 0, lane, run_count, 1, size, 0)
    check = Checks(STREAM[: STARTS[1]]).of(blank, body)
    return STREAM[: STARTS[2]] + HEADER.pack(kind, 0, lane, run_count, 1, size, check) + body


def table(*pairs: tuple[int, int]) -> bytes:
    return np.array(pairs, "<u8").tobytes()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\x7fELF" + bytes(60), "does not begin with the word kvmmig"),
        (stream.MAGIC + (9).to_bytes(4, "little") + bytes(4), "version 9; this kvmmig speaks version 2"),
        (stream.MAGIC + (1).to_bytes(4, "little") + bytes(4), "version 1; .* Use the kvmmig that wrote it"),
        (stream.MAGIC + (2).to_bytes(4, "little") + b"\1\0\0\0", "wrong direction"),
        (forged(77, b""), "unknown kind 77"),
        (forged(Kind.GO, b""), "GO frame is out of place: the stream is in its memory"),
        (forged(Kind.END, b"{}"), "END frame is out of place"),
        (forged(Kind.ZEROS, table((60, 5)), run_count=1), "outside the guest's 64"),
        (forged(Kind.ZEROS, table((2**64 - 1, 2)), run_count=1), "outside the guest"),
        (forged(Kind.ZEROS, table((2**63, 2**63)), run_count=1), "outside the guest"),
        (forged(Kind.ZEROS, table((5, 0)), run_count=1), "outside the guest"),
        (forged(Kind.ZEROS, table((5, 3), (6, 1)), run_count=2), "overlap or are out of order"),
        (forged(Kind.ZEROS, table((9, 1), (6, 1)), run_count=2), "overlap or are out of order"),
        (forged(Kind.ZEROS, b"", run_count=0), "claims 0 runs"),
        (forged(Kind.ZEROS, b"", run_count=2**32 - 1, length=2**36), "claims 4294967295 runs"),
        (
            forged(Kind.PAGES, table((0, 1)), run_count=1, length=2**40),
            "claims 1 runs in 1099511627776 bytes",
        ),
        (forged(Kind.PAGES, table((0, 2)), run_count=1, length=16 + 4096), "names 2 pages but carries 4096"),
        (forged(Kind.SECTION, b"", length=2**31), "claims 2147483648 bytes"),
        (forged(Kind.SECTION, b"\1"), "too short for its own head"),
        (forged(Kind.SECTION, SECTION_HEAD.pack(9, 0, 1) + b"abc"), "does not fit its own head"),
        (forged(Kind.SECTION, SECTION_HEAD.pack(1, 0, 1) + b"\xff"), "is not text"),
        (forged(Kind.FAIL, b"x", lane=3), "fields that version 2 leaves zero"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, sentence: str) -> None:
    with pytest.raises(StreamError, match=sentence):
        decode(data)


def test_an_unknown_feature_is_refused_by_name() -> None:
    encoder = Encoder(Direction.FORWARDS)
    data = encoder.preamble() + encoder.hello(4, b"{}", ["holograms"])
    with pytest.raises(StreamVersion, match="the stream uses holograms"):
        decode(data)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"n_pages": "x"}',
        b'{"n_pages": 0, "machine": {}}',
        b'{"n_pages": 16777217, "machine": {}}',
        b"[" * 100_000,
    ],
)
def test_a_hello_that_is_none_is_a_stream_error(body: bytes) -> None:
    encoder = Encoder(Direction.FORWARDS)
    data = encoder.preamble()
    with pytest.raises(StreamError):
        decode(data + encoder._frame(Kind.HELLO, body))


def test_totals_that_differ_are_found() -> None:
    encoder = Encoder(Direction.FORWARDS)
    data = encoder.preamble() + encoder.hello(4, b"{}") + encoder.section(stream.Section("a", 1, b""))
    encoder.pages += 1
    with pytest.raises(
        StreamError, match="the source counted 1 pages, 0 zero pages and 1 sections, but 0, 0 and 1"
    ):
        decode(data + encoder.end(running=True))


def test_fail_ends_a_stream_anywhere_and_carries_a_sentence() -> None:
    for stop in STARTS[1:-1]:
        decoder = Decoder(Direction.FORWARDS)
        encoder = Encoder(Direction.FORWARDS, identity=IDENTITY)
        encoder.state = stream.StreamState.MEMORY
        encoder._sequence = STARTS.index(stop) - 1
        data = STREAM[:stop] + encoder.fail("no room")
        events = []
        while data:
            size = len(decoder.buffer())
            decoder.buffer()[:] = data[:size]
            event = decoder.advance(size)
            data = data[size:]
            if isinstance(event, stream.Pages):
                decoder.place([memoryview(bytearray(event.n_pages * 4096))])
            events.append(event)
        assert events[-1] == stream.Fail("no room")
        assert decoder.finished


def test_the_backward_direction_says_accept_ready_running() -> None:
    encoder, decoder = Encoder(Direction.BACKWARDS), Decoder(Direction.BACKWARDS)
    data = encoder.preamble() + b"".join(map(encoder.signal, (Kind.ACCEPT, Kind.READY, Kind.RUNNING)))
    said = []
    while data:
        size = len(decoder.buffer())
        decoder.buffer()[:] = data[:size]
        said.append(decoder.advance(size))
        data = data[size:]
    assert [event.kind for event in said if isinstance(event, stream.Signal)] == [
        Kind.ACCEPT,
        Kind.READY,
        Kind.RUNNING,
    ]
    assert decoder.finished


def _in_memory() -> Encoder:
    encoder = Encoder(Direction.FORWARDS)
    encoder.preamble()
    encoder.hello(N_PAGES, b"{}")
    return encoder


@pytest.mark.parametrize(
    "breach",
    [
        lambda e: e.preamble(),
        lambda e: e.signal(Kind.GO),
        lambda e: e.end(running=True),
        lambda e: e.page_runs(runs((0, 2)), [memoryview(bytes(4096))]),
        lambda e: e.zero_runs(runs((63, 2))),
        lambda e: e.zero_runs(runs((3, 2), (4, 1))),
        lambda e: e.zero_runs(runs()),
        lambda e: e.section(stream.Section("", 1, b"")),
        lambda e: e.section(stream.Section("x", 1, bytes(stream.MAX_SECTION + 1))),
    ],
)
def test_the_encoder_says_nothing_that_the_protocol_does_not_allow(
    breach: Callable[[Encoder], object],
) -> None:
    with pytest.raises(LocalStreamError):
        breach(_in_memory())


def test_room_of_the_wrong_size_is_refused() -> None:
    decoder = Decoder(Direction.FORWARDS)
    with pytest.raises(LocalStreamError):
        decoder.place([memoryview(bytearray(4096))])
