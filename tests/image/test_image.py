"""The image without KVM: it says what was in memory, and nothing that was done to it goes unnoticed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmig import stream
from kvmmig.errors import ImageError
from kvmmig.image import BLOCK_PAGES, HEAD_SIZE, MEMORY_AT, Builder, OpenImage, PieceCursor
from kvmmig.image.convert import StreamReader, image_of, stream_of
from kvmmig.image.format import Layout, manifest_length
from kvmmig.image.opened import ImageInOrder, changed_runs
from kvmmig.image.reading import open_image, reader, stored_parts

PAGES = 3 * BLOCK_PAGES
PAGE = stream.PAGE_SIZE
MACHINE = b'{"name":"test"}'
STATE = [stream.Section("cpu0/regs", 1, b"registers"), stream.Section("dev/serial", 2, b"")]

Words = npt.NDArray[np.uint64]


class Saved:
    """A guest's memory, and the file that it is written to."""

    def __init__(self, path: Path, n_pages: int = PAGES) -> None:
        self.memory: Words = np.zeros((n_pages, PAGE // 8), np.uint64)
        self.path = path
        self.builder = Builder(
            n_pages, lambda first, count: self.memory[first : first + count].data.cast("B")
        )
        self.written = 0
        path.write_bytes(b"")

    def write(self, pages: list[int]) -> None:
        wanted = np.zeros(len(self.memory), np.bool_)
        wanted[pages] = True
        zero = np.bitwise_or.reduce(self.memory, axis=1) == 0
        self._put(self.builder.write(0, wanted, zero))

    def finish(self) -> bytes:
        self._put(self.builder.finish(MACHINE, STATE, running=True, saved_by="a test"))
        return self.path.read_bytes()

    def _put(self, pieces: list[tuple[int, memoryview]]) -> None:
        with self.path.open("r+b") as file:
            for offset, data in pieces:
                os.pwrite(file.fileno(), data, offset)
                self.written += len(data)


def problems(data: bytes) -> list[str]:
    """What is found when an image is opened and verified."""
    try:
        read = lambda offset, length: data[offset : offset + length]  # noqa: E731
        return list(OpenImage(read, len(data)).verify(read, [(0, len(data))]))
    except ImageError as error:
        return [str(error)]


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    saved = Saved(tmp_path / "whole.img")
    saved.memory[5:9] = 7
    saved.memory[2 * BLOCK_PAGES + 3, 17] = 1
    saved.write(list(range(PAGES)))
    return saved.finish()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_whatever_is_written_when_the_image_has_the_memory_as_it_was_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int
) -> None:
    chance = random.Random(seed)
    saved = Saved(tmp_path_factory.mktemp("image") / "a.img")
    dirty = set(range(PAGES))
    for _ in range(rounds):
        for _ in range(chance.randrange(40)):
            page = chance.randrange(PAGES)
            saved.memory[page] = chance.choice([0, 0, 1, 2, 3])
            dirty.add(page)
        written, dirty = sorted(dirty), set()
        saved.write(written)
    data = saved.finish()
    assert data[MEMORY_AT : MEMORY_AT + PAGES * PAGE] == saved.memory.tobytes()
    assert problems(data) == []
    opened = OpenImage(lambda offset, length: data[offset : offset + length], len(data))
    assert opened.sections == STATE
    assert bytes(opened.header.machine) == MACHINE
    assert opened.header.running


def test_zero_pages_are_holes_and_rounds_do_not_make_it_grow(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "a.img", 64 * BLOCK_PAGES)
    saved.memory[0] = saved.memory[1000:1064] = 1
    saved.write(list(range(len(saved.memory))))
    for _ in range(20):
        saved.memory[1010:1020] += 1
        saved.write(list(range(1010, 1020)))
    saved.finish()
    found = saved.path.stat()
    assert found.st_blocks * 512 <= 65 * PAGE + 16 * PAGE
    with saved.path.open("rb") as file:
        assert open_image(file.fileno()).header.data_pages == 65


def test_a_byte_that_was_changed_anywhere_is_noticed(whole: bytes) -> None:
    chance = random.Random(3)
    tail = Layout(PAGES).page_map_at
    places = [
        *(chance.randrange(8, HEAD_SIZE + 200) for _ in range(100)),
        *(MEMORY_AT + chance.randrange(PAGES * PAGE) for _ in range(200)),  # holes too
        *(tail + chance.randrange(3 * 8) for _ in range(20)),
        *(tail + PAGE + chance.randrange(3 * 8) for _ in range(20)),
        *(tail + 2 * PAGE + chance.randrange(len(whole) - tail - 2 * PAGE - PAGE + 40) for _ in range(20)),
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        assert problems(bytes(damaged)), place


def test_what_was_cut_or_added_to_is_refused(whole: bytes) -> None:
    for size in (0, 4, 20, HEAD_SIZE + 10, MEMORY_AT, len(whole) // 2, len(whole) - 1):
        assert problems(whole[:size])
    assert "was cut, or added to" in problems(whole + b"x")[0]


def test_parts_of_two_images_of_the_same_guest_make_none(tmp_path: Path) -> None:
    images = []
    for name in ("a.img", "b.img"):
        saved = Saved(tmp_path / name)
        saved.memory[:] = 9
        saved.write(list(range(PAGES)))
        images.append(saved.finish())
    one, other = images
    for cut in (
        HEAD_SIZE,
        4096,
        MEMORY_AT + PAGE,
        Layout(PAGES).page_map_at,
        Layout(PAGES).digests_at,
        len(one) - PAGE,
    ):
        assert one[:cut] + other[cut:] == one or problems(one[:cut] + other[cut:]), cut


def test_a_block_from_elsewhere_in_the_same_image_is_noticed(whole: bytes) -> None:
    size = BLOCK_PAGES * PAGE
    moved = bytearray(whole)
    moved[MEMORY_AT : MEMORY_AT + size] = whole[MEMORY_AT + 2 * size : MEMORY_AT + 3 * size]
    assert problems(bytes(moved)) == ["the pages 0 to 63 are damaged: their digest does not fit"]


def test_a_manifest_that_lies_about_sizes_is_refused(whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmmig.image.format.xxhash.xxh3_128_digest", lambda data: whole[32:48])
    for old, new in ((b'"n_pages":192', b'"n_pages":256'), (b'"state_size":', b'"state_size":99')):
        length = manifest_length(whole[:HEAD_SIZE])
        manifest = whole[HEAD_SIZE : HEAD_SIZE + length].replace(old, new)
        head = whole[:12] + len(manifest).to_bytes(4, "little") + whole[16:HEAD_SIZE]
        assert "makes no sense" in problems(head + manifest + whole[HEAD_SIZE + len(manifest) :])[0]


def test_a_later_version_is_refused_by_its_number(whole: bytes) -> None:
    assert "an image of version 2" in problems(whole[:8] + b"\2" + whole[9:])[0]


def test_in_order_it_is_the_same_image(whole: bytes) -> None:
    head = whole[:HEAD_SIZE]
    opened = ImageInOrder(head, whole[HEAD_SIZE : HEAD_SIZE + manifest_length(head)])
    opened.finish(whole[Layout(PAGES).page_map_at :])
    assert opened.sections == STATE
    with pytest.raises(ImageError, match="cut, or added to"):
        opened.finish(whole[Layout(PAGES).page_map_at : -1])


def test_two_images_differ_in_the_pages_that_were_written_between_them(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "a.img")
    saved.memory[:100] = 1
    saved.write(list(range(PAGES)))
    before = saved.finish()
    saved.memory[70:73] = saved.memory[190, 511] = 5
    saved.write([70, 71, 72, 190])
    after = saved.finish()

    def read_before(offset: int, length: int) -> bytes:
        return before[offset : offset + length]

    def read_after(offset: int, length: int) -> bytes:
        return after[offset : offset + length]

    one, other = OpenImage(read_before, len(before)), OpenImage(read_after, len(after))
    runs = changed_runs(one, other, read_before, read_after)
    assert runs.tolist() == [[70, 3], [190, 1]]


def test_an_image_becomes_a_stream_and_an_image_again(tmp_path: Path, whole: bytes) -> None:
    data = bytearray()
    read = lambda offset, length: whole[offset : offset + length]  # noqa: E731
    stream_of(OpenImage(read, len(whole)), read, data.extend)
    left = memoryview(bytes(data))

    def take(buffer: memoryview) -> int:
        nonlocal left
        count = min(len(buffer), len(left), 100_000)
        buffer[:count], left = left[:count], left[count:]
        return count

    back = bytearray(len(whole))

    def put(piece: tuple[int, memoryview]) -> None:
        offset, part = piece
        back[offset : offset + len(part)] = part

    image_of(StreamReader(take), put, saved_by="a test")
    assert problems(bytes(back)) == []
    tail = Layout(PAGES).page_map_at
    assert back[MEMORY_AT:tail] == whole[MEMORY_AT:tail]


def test_a_cursor_gives_every_byte_once_whatever_is_accepted() -> None:
    chance = random.Random(5)
    source = np.random.default_rng(1).integers(0, 255, 40 * PAGE, np.uint8)
    target = np.zeros_like(source)
    cursor, called = PieceCursor(), []
    at = 0
    while at < 40:
        count = min(chance.randint(1, 9), 40 - at)
        data = source[at * PAGE : (at + count) * PAGE].data
        cursor.put([(at * PAGE, data)], accepted=lambda at=at: called.append(at))  # type: ignore[misc]
        at += count
    while not cursor.empty:
        pieces = cursor.head(chance.randint(1, 12 * PAGE))
        accepted = chance.randint(1, sum(len(data) for _, data in pieces) // PAGE) * PAGE
        left = accepted
        for offset, data in pieces:
            part = data[:left]
            target[offset : offset + len(part)] = np.frombuffer(part, np.uint8)
            left -= len(part)
        cursor.advance(accepted)
    assert (source == target).all()
    assert called == sorted(called)
    assert len(called) > 4


def test_holes_of_a_file_are_told_from_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), b"x" * PAGE, 4 << 20)
    with path.open("rb") as file:
        assert stored_parts(file.fileno()) == [(4 << 20, PAGE)]
        assert reader(file.fileno())((4 << 20) - 1, 3) == b"\0xx"
