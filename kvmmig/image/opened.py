"""An image that is there: its head and tables, checked, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvmmig import stream
from kvmmig.errors import ImageError
from kvmmig.image.format import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    HEAD_SIZE,
    MEMORY_AT,
    PAGE_SIZE,
    Header,
    Layout,
    Words,
    block_digest,
    decode_head,
    decode_state,
    digest_of,
    manifest_length,
    seed_of,
)

Read = Callable[[int, int], bytes]
Runs = stream.Runs


class OpenImage:
    """An image whose head, tables and state are whole; its memory is checked by `check_block`.

    Blocking: it reads when it is made. Raises `ImageError` for what is no whole image.
    """

    def __init__(self, read: Read, size: int) -> None:
        """``read(offset, length)`` gives bytes, fewer only at the file's end; ``size`` is the file's."""
        head = read(0, HEAD_SIZE)
        self._decode(head, read(HEAD_SIZE, manifest_length(head)))
        if size != self.header.size:
            raise ImageError(f"it has {size} bytes instead of {self.header.size}: it was cut, or added to")
        layout = self.layout
        self._decode_tables(
            read(layout.page_map_at, layout.n_blocks * 8),
            read(layout.digests_at, layout.n_blocks * 8),
            read(layout.state_at, self.header.state_size),
        )

    def _decode(self, head: bytes, manifest: bytes) -> None:
        header, identity = decode_head(head, manifest)
        #: Its manifest.
        self.header: Header = header
        #: Where its parts are.
        self.layout = Layout(header.n_pages)
        #: 16 bytes that no other image has.
        self.identity = identity
        self._seed = seed_of(identity)

    def _decode_tables(self, page_map: bytes, digests: bytes, state: bytes) -> None:
        for what, data, digest in (
            ("page map", page_map, self.header.page_map),
            ("table of digests", digests, self.header.digests),
            ("machine state", state, self.header.state),
        ):
            if digest_of(data, self._seed) != digest:
                raise ImageError(f"its {what} is damaged: the digest does not fit")
        #: A bit for each page that the file has data for.
        self.page_map: Words = np.frombuffer(page_map, "<u8").astype(np.uint64)
        self._digests: Words = np.frombuffer(digests, "<u8").astype(np.uint64)
        #: The machine's state.
        self.sections = decode_state(state)

    def data_runs(self, unit: int = 1) -> Runs:
        """The pages with data, as runs; each begins and ends at a multiple of ``unit`` pages, 64 at least,
        where that is more than 1."""
        if unit == 1:
            return _runs(np.unpackbits(self.page_map.view(np.uint8), bitorder="little").view(np.bool_), 1)
        blocks = self.page_map != 0
        per_unit = unit // BLOCK_PAGES
        padding = -len(blocks) % per_unit
        whole = np.concatenate((blocks, np.zeros(padding, np.bool_)))
        runs = _runs(np.logical_or.reduce(whole.reshape(-1, per_unit), axis=1), unit)
        if len(runs):
            runs[-1, 1] = min(int(runs[-1].sum()), self.header.n_pages) - runs[-1, 0]
        return runs

    def check_block(self, block: int, data: memoryview) -> str:
        """What is wrong with these bytes of memory, a sentence; empty where nothing is."""
        first = block * BLOCK_PAGES
        pages = f"the pages {first} to {first + BLOCK_PAGES - 1} are damaged"
        if not self.page_map[block]:
            return f"{pages}: they are not zero" if np.frombuffer(data, np.uint64).any() else ""
        right = block_digest(data, self._seed) == int(self._digests[block])
        return "" if right else f"{pages}: their digest does not fit"

    def data_blocks(self) -> list[int]:
        """The numbers of the blocks that have data, ascending. All others are zero."""
        return [int(block) for block in np.flatnonzero(self.page_map)]

    def verify(self, read: Read, stored: Sequence[tuple[int, int]]) -> Iterator[str]:
        """Read all memory; a sentence for each block that is damaged.

        ``stored`` are the parts of the file that are no holes: offsets, and lengths in bytes.
        """
        there = self.page_map != 0
        for offset, length in stored:
            first = max(offset - MEMORY_AT, 0) // BLOCK_SIZE
            there[first : max(offset + length - MEMORY_AT + BLOCK_SIZE - 1, 0) // BLOCK_SIZE] = True
        for block in np.flatnonzero(there).tolist():
            data = read(MEMORY_AT + block * BLOCK_SIZE, BLOCK_SIZE)
            if problem := self.check_block(block, memoryview(data)):
                yield problem


class ImageInOrder(OpenImage):
    """An image that comes as a stream of bytes: its head first, its tables behind its memory."""

    def __init__(self, head: bytes, manifest: bytes) -> None:
        """``head`` has `HEAD_SIZE` bytes, ``manifest`` what `manifest_length` says."""
        self._decode(head, manifest)
        #: Bytes of the manifest, which ends before memory begins.
        self.manifest_size = len(manifest)

    def finish(self, tail: bytes) -> None:
        """``tail`` is all that follows the memory."""
        layout, at = self.layout, self.layout.page_map_at
        if len(tail) != self.header.size - at:
            raise ImageError("it was cut, or added to: what follows its memory has not the right length")
        self._decode_tables(
            tail[: layout.n_blocks * 8],
            tail[layout.digests_at - at :][: layout.n_blocks * 8],
            tail[layout.state_at - at :][: self.header.state_size],
        )


def changed_runs(one: OpenImage, other: OpenImage, read_one: Read, read_other: Read) -> Runs:
    """The pages in which two images of guests of one size differ. Raises `ImageError` for other sizes."""
    if one.header.n_pages != other.header.n_pages:
        raise ImageError(
            f"the one has {one.header.n_pages} pages and the other {other.header.n_pages}; only images of "
            "guests with as much memory can be compared"
        )
    differ = np.zeros(one.header.n_pages, np.bool_)
    for block in np.flatnonzero(one.page_map | other.page_map).tolist():
        at = MEMORY_AT + block * BLOCK_SIZE
        mine, theirs = read_one(at, BLOCK_SIZE), read_other(at, BLOCK_SIZE)
        if mine != theirs:
            words = np.frombuffer(mine, np.uint64) != np.frombuffer(theirs, np.uint64)
            first = block * BLOCK_PAGES
            differ[first : first + BLOCK_PAGES] = words.reshape(BLOCK_PAGES, PAGE_SIZE // 8).any(axis=1)
    return _runs(differ, 1)


def _runs(flags: npt.NDArray[np.bool_], unit: int) -> Runs:
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).reshape(-1, 2).astype(np.int64)
    edges[:, 1] -= edges[:, 0]
    return edges * unit
