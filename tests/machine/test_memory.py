"""Guest memory: where things lie, and what a migration must be told of."""

from __future__ import annotations

import numpy as np
import pytest

from kvmmig.errors import BadConfig
from kvmmig.machine.memory import HOLE, MEMORY_UNIT, PAGE_SIZE, GuestMemory, pc_regions
from kvmmig.machine.pageset import PageSet, runs_of

GIB = 1 << 30


def test_ram_up_to_three_gib_is_one_region() -> None:
    assert [(r.gpa, r.size, r.first_page) for r in pc_regions(3 * GIB)] == [(0, 3 * GIB, 0)]


def test_ram_beyond_three_gib_goes_on_behind_the_hole() -> None:
    low, high = pc_regions(5 * GIB)
    assert (low.gpa, low.size) == (0, HOLE[0])
    assert (high.gpa, high.size, high.first_page) == (HOLE[1], 2 * GIB, 3 * GIB // PAGE_SIZE)


@pytest.mark.parametrize("size", [0, -4096, 4096, MEMORY_UNIT + 4096])
def test_a_size_that_is_no_multiple_of_the_unit_is_refused(size: int) -> None:
    with pytest.raises(BadConfig, match="multiple of 256 KiB"):
        GuestMemory(size)


def test_what_is_written_is_read_back_on_both_sides_of_the_hole() -> None:
    memory = GuestMemory(4 * GIB)  # not populated: only the touched pages cost anything
    memory.write(0x1234, b"low")
    memory.write(HOLE[1] + 5, b"high")
    assert memory.read(0x1234, 3) == b"low"
    assert memory.read(HOLE[1] + 5, 4) == b"high"
    assert bytes(memory.pages(3 * GIB // PAGE_SIZE))[5:9] == b"high", "pages are numbered over the hole"
    memory.close()


@pytest.mark.parametrize(("gpa", "length"), [(3 * GIB - 1, 2), (3 * GIB, 1), (5 * GIB, 1), (4 * GIB - 1, 2)])
def test_an_access_that_leaves_ram_is_refused(gpa: int, length: int) -> None:
    memory = GuestMemory(4 * GIB)
    with pytest.raises(ValueError, match="not all inside"):
        memory.view(gpa, length)
    memory.close()


def test_host_writes_are_remembered_only_while_they_are_tracked() -> None:
    memory = GuestMemory(MEMORY_UNIT)
    found = PageSet(memory.n_pages)
    memory.write(0, b"before")
    memory.track_host_writes(True)
    memory.write(3 * PAGE_SIZE - 1, b"over an edge")
    memory.take_host_writes(found)
    assert found.pages().tolist() == [2, 3]
    found.clear()
    memory.take_host_writes(found)
    assert not found, "what was taken is forgotten"
    memory.close()


def test_zero_pages_are_told_from_those_with_one_bit_set() -> None:
    memory = GuestMemory(MEMORY_UNIT)
    memory.write(5 * PAGE_SIZE + 4095, b"\x80")
    memory.write(6 * PAGE_SIZE, b"\x01")
    pages = np.arange(64)
    assert np.flatnonzero(~memory.are_zero(pages)).tolist() == [5, 6]
    assert memory.are_zero(np.array([4, 5, 7])).tolist() == [True, False, True]
    memory.close()


def test_gathered_pages_scatter_back_to_their_places() -> None:
    one, two = GuestMemory(MEMORY_UNIT), GuestMemory(MEMORY_UNIT)
    pages = np.array([1, 2, 9, 63])
    for page in pages.tolist():
        one.write(page * PAGE_SIZE, bytes([page]) * PAGE_SIZE)
    two.scatter(runs_of(pages), one.gather(pages, np.empty((len(pages), 512), np.uint64)))
    assert (two.words == one.words).all()
    two.zero(runs_of(np.array([2, 9])))
    assert np.flatnonzero(two.words[:, 0]).tolist() == [1, 63]
    one.close()
    two.close()


def test_closing_twice_or_while_a_view_lives_is_no_error() -> None:
    memory = GuestMemory(MEMORY_UNIT)
    view = memory.pages(0)
    memory.close()
    memory.close()
    assert view[0] == 0, "what is still read stays mapped"
