"""Torn images: whatever is put together from parts of streams is refused, or is the very guest that was sent.

The right answer is known by the guest's memory: what a receiver has at the end is compared with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmig import stream
from kvmmig.errors import StreamError
from kvmmig.stream import Decoder, Direction, Encoder, Kind
from kvmmig.units import MEMORY

N_PAGES = 12
SECTIONS = {"cpu0/regs": 144, "cpu0/sregs": 312, "dev/serial": 100}


def runs(*pairs: tuple[int, int]) -> stream.Runs:
    return np.array(pairs, np.int64).reshape(-1, 2)


def memory_of(seed: int) -> bytes:
    """A guest with some zero pages; of two seeds, some pages are the same and some are not."""
    pages = [bytes(4096) if n % 4 == 3 else bytes([n, seed * (n % 2)]) * 2048 for n in range(N_PAGES)]
    return b"".join(pages)


def save(memory: bytes, identity: bytes) -> list[bytes]:
    """The frames of one saved guest; the first page is sent twice, the first time as it was before."""
    encoder = Encoder(Direction.FORWARDS, identity=identity)
    view = memoryview(memory)

    def pages(first: int, count: int, data: memoryview) -> bytes:
        return b"".join(encoder.page_runs(runs((first, count)), [data]))

    frames = [encoder.preamble(), encoder.hello(N_PAGES, b'{"name":"guest"}', [stream.PAGE_DIGESTS])]
    frames.append(pages(0, 1, memoryview(b"\x07" * 4096)))
    frames += [pages(n, 3, view[n * 4096 : (n + 3) * 4096]) for n in range(0, N_PAGES, 4)]
    frames.append(encoder.zero_runs(runs(*((n, 1) for n in range(3, N_PAGES, 4)))))
    for name, size in SECTIONS.items():
        frames.append(encoder.section(stream.Section(name, 1, memory[:size])))
    return [*frames, encoder.end(running=True), encoder.signal(Kind.GO)]


def restore(data: bytes, decoder: Decoder | None = None) -> tuple[bytes, list[stream.Section]]:
    """What a receiver has at the end. `StreamError` where it refuses."""
    decoder = decoder or Decoder(Direction.FORWARDS)
    memory = memoryview(bytearray(b"\xee" * (N_PAGES * 4096)))
    sections = []
    rest = memoryview(data)
    while not decoder.finished:
        room = decoder.buffer()
        size = min(len(room), len(rest))
        if not size:
            decoder.end_of_stream()
        room[:size], rest = rest[:size], rest[size:]
        match decoder.advance(size):
            case stream.Pages(table, _):
                decoder.place([memory[f * 4096 : (f + c) * 4096] for f, c in table.tolist()])
            case stream.Zeros(table, _):
                for first, count in table.tolist():
                    memory[first * 4096 : (first + count) * 4096] = bytes(count * 4096)
            case stream.Section() as section:
                sections.append(section)
    if rest:
        raise StreamError("the stream goes on behind its end")
    return bytes(memory), sections


OLD, NEW = memory_of(1), memory_of(2)
FRAMES = save(NEW, b"n" * 16)
OTHER = save(OLD, b"o" * 16)
IMAGE, OTHER_IMAGE = b"".join(FRAMES), b"".join(OTHER)
STARTS = [0, *itertools.accumulate(map(len, FRAMES))]
GUEST = restore(IMAGE)


def check(torn: bytes) -> None:
    """It is refused, or it is the one guest or the other, all of it."""
    try:
        guest = restore(torn)
    except StreamError:
        assert torn not in (IMAGE, OTHER_IMAGE)
    else:
        assert guest in (GUEST, restore(OTHER_IMAGE)), "a guest that never was has been accepted"
        assert torn in (IMAGE, OTHER_IMAGE)


def refused(torn: bytes) -> str:
    with pytest.raises(StreamError) as caught:
        restore(torn)
    return str(caught.value)


def test_the_image_itself_is_the_guest() -> None:
    assert GUEST[0] == NEW
    assert [section.name for section in GUEST[1]] == list(SECTIONS)


def test_the_head_of_one_image_and_the_tail_of_another_are_refused_at_every_frame() -> None:
    assert len(IMAGE) == len(OTHER_IMAGE), "so a copy over an older one leaves its tail"
    for at in range(1, len(FRAMES)):
        assert "of another stream" in refused(b"".join(FRAMES[:at] + OTHER[at:]))
        assert "of another stream" in refused(b"".join(OTHER[:at] + FRAMES[at:]))


def test_the_same_guest_saved_twice_is_two_streams() -> None:
    again = save(NEW, b"m" * 16)
    for at in range(1, len(FRAMES)):
        refused(b"".join(FRAMES[:at] + again[at:]))


def test_the_digest_over_the_whole_finds_what_even_the_identity_does_not() -> None:
    twin = save(OLD, b"n" * 16)
    for at in range(1, len(FRAMES) - 1):
        if FRAMES[:at] != twin[:at]:
            assert "the digest over its frames is wrong" in refused(b"".join(FRAMES[:at] + twin[at:]))


def test_two_images_are_refused_where_a_copy_stopped_inside_a_frame() -> None:
    for start, at in itertools.product(STARTS[:-1], (1, 15, 17, 31, 33, 60, 100, 4000)):
        if start + at < len(IMAGE):
            check(IMAGE[: start + at] + OTHER_IMAGE[start + at :])


def test_two_streams_interleaved_are_refused() -> None:
    woven = [frame for pair in zip(FRAMES, OTHER, strict=True) for frame in pair]
    for frames in (woven, woven[2:], woven[:1] + woven[2:]):
        refused(b"".join(frames))


def test_every_cut_and_every_lost_repeated_or_exchanged_frame_is_refused() -> None:
    for n, m in itertools.product(range(len(FRAMES)), repeat=2):
        if n != m:
            moved = [*FRAMES]
            moved[n], moved[m] = moved[m], moved[n]
            refused(b"".join(moved))
        refused(b"".join([*FRAMES[:m], FRAMES[n], *FRAMES[m:]]) if n != m else IMAGE[: STARTS[n]])
        refused(b"".join(FRAMES[:n] + FRAMES[n + 1 :]))


def test_a_bit_flipped_anywhere_is_refused() -> None:
    places = {start + at for start in STARTS[:-1] for at in (*range(120), 4096, 8192)}
    for place in sorted(place for place in places if place < len(IMAGE)):
        torn = bytearray(IMAGE)
        torn[place] ^= 1 << place % 8
        refused(bytes(torn))


def torn_images() -> st.SearchStrategy[bytes]:
    """Made of parts of both images: joined, cut, flipped, frames repeated and moved."""
    cut = st.integers(0, len(IMAGE))
    frame = st.sampled_from(FRAMES + OTHER)

    def flip(at: int, bit: int) -> bytes:
        return IMAGE[:at] + bytes([IMAGE[at] ^ 1 << bit]) + IMAGE[at + 1 :]

    def join(a: bytes, b: bytes, at: int, to: int) -> bytes:
        return a[:at] + b[to:]

    images = st.sampled_from([IMAGE, OTHER_IMAGE])
    return st.one_of(
        st.builds(join, images, images, cut, cut),
        cut.map(lambda at: IMAGE[:at] + OTHER_IMAGE[at:]),
        st.builds(lambda a, b, c: a[:b] + a[c:], images, cut, cut),
        st.builds(flip, st.integers(0, len(IMAGE) - 1), st.integers(0, 7)),
        st.lists(frame, max_size=14).map(b"".join),
        st.permutations(FRAMES).map(b"".join),
        st.builds(lambda n, new: b"".join([*FRAMES[:n], new, *FRAMES[n + 1 :]]), st.integers(0, 11), frame),
    )


@settings(max_examples=300)
@given(torn_images())
def test_no_torn_image_is_accepted_wrongly(torn: bytes) -> None:
    check(torn)


@pytest.mark.slow
@settings(max_examples=10_000, suppress_health_check=list(HealthCheck), deadline=None)
@given(torn_images())
def test_none_of_ten_thousand_torn_images_is_accepted_wrongly(torn: bytes) -> None:
    check(torn)


# -- not whole, though no bit of it is wrong ----------------------------------------------------------


def honest(say: Callable[[Encoder], list[bytes]]) -> bytes:
    encoder = Encoder(Direction.FORWARDS)
    parts = [encoder.preamble(), encoder.hello(N_PAGES, b"{}"), encoder.section(stream.Section("a", 1, b""))]
    return b"".join([*parts, *say(encoder), encoder.end(running=True), encoder.signal(Kind.GO)])


@pytest.mark.parametrize(
    ("say", "missing"),
    [
        (lambda encoder: [], N_PAGES),
        (lambda encoder: [encoder.zero_runs(runs((0, 1), (2, N_PAGES - 2)))], 1),
        (lambda encoder: [encoder.zero_runs(runs((0, N_PAGES - 1)))], 1),
        (lambda encoder: encoder.page_runs(runs((4, 2)), [memoryview(bytes(8192))]), N_PAGES - 2),
        (lambda encoder: [encoder.zero_runs(runs((0, 6))), encoder.zero_runs(runs((0, 6)))], 6),
    ],
)
def test_a_page_that_never_came_is_missed(say: Callable[[Encoder], list[bytes]], missing: int) -> None:
    assert f"{missing} of the guest's {N_PAGES} pages never came" in refused(honest(say))


def test_a_guest_whose_pages_came_as_data_and_as_zero_is_whole() -> None:
    def say(encoder: Encoder) -> list[bytes]:
        data = encoder.page_runs(runs((0, 5)), [memoryview(bytes(5 * 4096))])
        return [*map(bytes, data), encoder.zero_runs(runs((5, N_PAGES - 5)))]

    assert restore(honest(say))[0] == bytes(N_PAGES * 4096)


def test_the_largest_machine_fits_into_a_stream() -> None:
    assert MEMORY.most == stream.MAX_PAGES * stream.PAGE_SIZE


# -- state sections ------------------------------------------------------------------------------------


def up_to_section(section: bytes) -> bytes:
    return b"".join(FRAMES[:7]) + section


def test_a_section_that_is_too_large_is_refused_by_its_header_alone() -> None:
    encoder = Encoder(Direction.FORWARDS, identity=b"n" * 16)
    save_like(encoder)
    large = encoder.section(stream.Section("cpu0/regs", 1, bytes(100_000)))
    decoder = Decoder(Direction.FORWARDS)
    decoder.limit_sections(3, 4096, 10_000)
    with pytest.raises(StreamError, match=r"SECTION frame at byte .* claims 1000.. bytes; that is too many"):
        restore(up_to_section(large[:32]), decoder)


def test_sections_that_are_too_many_or_too_much_together_are_refused_when_the_next_one_begins() -> None:
    for count, total, sentence in ((2, 10_000, "more than 2 state sections"), (9, 150, "that is too many")):
        decoder = Decoder(Direction.FORWARDS)
        decoder.limit_sections(count, 4096, total)
        with pytest.raises(StreamError, match=sentence):
            restore(b"".join(FRAMES[:9]) + FRAMES[9][:32], decoder)


def test_a_section_that_is_there_twice_is_refused() -> None:
    encoder = Encoder(Direction.FORWARDS, identity=b"n" * 16)
    save_like(encoder)
    twice = [encoder.section(stream.Section("cpu0/regs", 1, b"x")) for _ in range(2)]
    assert "'cpu0/regs' is there twice" in refused(up_to_section(b"".join(twice)))


def save_like(encoder: Encoder) -> None:
    """Bring an encoder to where `FRAMES` has its first section."""
    encoder.preamble()
    encoder.hello(N_PAGES, b"{}")
    for _ in range(5):
        encoder.zero_runs(runs((0, 1)))
