"""The host's check of a dirtier, on memory that is written here as the guest would: no KVM needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest

from kvmmig.errors import BadConfig
from kvmmig.guests import check, dirtier
from kvmmig.machine import GuestMemory

MIB = 1 << 20
MEMORY = 8 * MIB
FIRST = dirtier.BOUNDARY // 4096
PAGES = MEMORY // 4096 - FIRST
HOT, STRIDE = 100, 3
PARAMETERS = {"hot": HOT * 4096, "stride": STRIDE}


def page(number: int, generation: int) -> dirtier.Words:
    """What a page must hold, from the formula in dirtier.asm, in plain Python."""
    words = []
    for j in range(512):
        z = number * dirtier.C1 + generation * dirtier.C2 + dirtier.C3 + j * dirtier.STEP
        z %= 1 << 64
        words.append(z ^ z >> 32)
    return np.array(words, np.uint64)


def status(
    memory: GuestMemory, *, filled: int = PAGES, progress: int = 0, laps: int = 0, bad: int = 0
) -> None:
    memory.write(dirtier.STATUS, struct.pack("<6Q", dirtier.MAGIC, PAGES, filled, progress, laps, bad))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """A dirtier in its third lap, which has written 40 hot pages of it and is about to write the next."""
    memory = GuestMemory(MEMORY)
    frames = np.arange(FIRST, FIRST + PAGES, dtype=np.uint64)
    generations = np.zeros(PAGES, np.uint64)
    generations[: HOT * STRIDE : STRIDE] = 2
    generations[: 40 * STRIDE : STRIDE] = 3
    words = memory.words[FIRST:]
    dirtier.contents(frames, generations, words, np.empty_like(words))
    status(memory, progress=2 * HOT + 40, laps=2)
    yield memory
    memory.close()


def faults(memory: GuestMemory) -> tuple[str, ...]:
    outcome = check("dirtier", memory, cpus=1, parameters=PARAMETERS)
    assert outcome is not None
    assert outcome.ok == (not outcome.faults)
    return outcome.faults


def test_contents_are_those_of_the_formula() -> None:
    frames, generations = np.array([FIRST, 1 << 20], np.uint64), np.array([0, 77], np.uint64)
    out, scratch = np.empty((2, 512), np.uint64), np.empty((2, 512), np.uint64)
    got = dirtier.contents(frames, generations, out, scratch)
    assert (got == [page(FIRST, 0), page(1 << 20, 77)]).all()
    assert got.all()


def test_right_memory_is_right(memory: GuestMemory) -> None:
    assert faults(memory) == ()


@pytest.mark.parametrize("index", [0, 1, 39 * STRIDE, 41 * STRIDE, HOT * STRIDE, PAGES - 1])
@pytest.mark.parametrize("word", [0, 511])
def test_a_wrong_word_of_any_page_is_found(memory: GuestMemory, index: int, word: int) -> None:
    memory.words[FIRST + index, word] ^= np.uint64(1 << 63)
    (fault,) = faults(memory)
    found = int(memory.words[FIRST + index, word])
    assert fault == (
        f"vcpu 0 page {FIRST + index:#x} word {word}: expected {found ^ 1 << 63:#x}, found {found:#x}"
    )


@pytest.mark.parametrize("words", [1, 17, 512])
def test_the_page_at_progress_may_be_written_in_part(memory: GuestMemory, words: int) -> None:
    busy = FIRST + 40 * STRIDE
    memory.words[busy, :words] = page(busy, 3)[:words]
    assert faults(memory) == ()


def test_the_page_at_progress_may_hold_nothing_else(memory: GuestMemory) -> None:
    busy = FIRST + 40 * STRIDE
    memory.words[busy, :17] = page(busy, 3)[:17]
    memory.words[busy, 17] = page(busy, 4)[17]
    assert len(faults(memory)) == 1


@pytest.mark.parametrize(("k", "generation"), [(39, 2), (41, 3)])
def test_no_other_page_may_be_written_in_part(memory: GuestMemory, k: int, generation: int) -> None:
    other = FIRST + k * STRIDE
    memory.words[other, :17] = page(other, generation)[:17]
    assert len(faults(memory)) == 1


def test_a_lap_that_is_done_leaves_the_first_hot_page_busy(memory: GuestMemory) -> None:
    for k in range(40, HOT):
        memory.words[FIRST + k * STRIDE] = page(FIRST + k * STRIDE, 3)
    status(memory, progress=3 * HOT, laps=2)
    memory.words[FIRST, :9] = page(FIRST, 4)[:9]
    assert faults(memory) == ()


def test_a_share_that_is_being_filled_is_zero_behind(memory: GuestMemory) -> None:
    for k in range(HOT):
        memory.words[FIRST + k * STRIDE] = page(FIRST + k * STRIDE, 0)
    filled = 1000
    memory.words[FIRST + filled, 100:] = 0
    memory.words[FIRST + filled + 1 :] = 0
    status(memory, filled=filled)
    assert faults(memory) == ()
    memory.words[FIRST + filled + 1, 5] = 1
    memory.words[FIRST + filled - 1, 5] = 0
    assert [fault.split(": ")[0] for fault in faults(memory)] == [
        f"vcpu 0 page {FIRST + filled - 1:#x} word 5",
        f"vcpu 0 page {FIRST + filled + 1:#x} word 5",
    ]


def test_a_guest_that_has_not_begun_has_zero_memory() -> None:
    memory = GuestMemory(MEMORY)
    assert faults(memory) == ()
    memory.words[-1, -1] = 1
    assert len(faults(memory)) == 1
    memory.close()


def test_a_lost_status_page_is_found(memory: GuestMemory) -> None:
    memory.words[dirtier.STATUS // 4096] = 0
    assert len(faults(memory)) == 8


def test_a_status_block_that_is_nonsense_is_a_fault(memory: GuestMemory) -> None:
    memory.write(dirtier.STATUS, struct.pack("<2Q", 1, PAGES))
    assert faults(memory) == (f"vcpu 0: its status block begins with 0x1 and not with {dirtier.MAGIC:#x}",)
    memory.write(dirtier.STATUS, struct.pack("<2Q", dirtier.MAGIC, 5))
    assert faults(memory) == (f"vcpu 0: its status block tells of 5 pages, and this vCPU has {PAGES}",)
    status(memory, filled=PAGES - 1, progress=1)
    assert "filled pages and 1 steps" in faults(memory)[0]


def test_what_the_guest_found_itself_is_a_fault(memory: GuestMemory) -> None:
    status(memory, progress=2 * HOT + 40, laps=2, bad=1)
    assert faults(memory) == ("vcpu 0 has itself found 1 wrong",)


def test_passes_are_sixteen_laps(memory: GuestMemory) -> None:
    status(memory, progress=2 * HOT + 40, laps=33)
    outcome = check("dirtier", memory, cpus=1, parameters=PARAMETERS)
    assert outcome is not None
    assert outcome.passes == 2


def test_pages_beyond_3_gib_go_on_at_4_gib() -> None:
    below, above = (3 << 30) // 4096 - 1, (3 << 30) // 4096
    got = dirtier.gfns(np.array([0, below, above, above + 1], np.uint64))
    assert got.tolist() == [0, below, (4 << 30) // 4096, (4 << 30) // 4096 + 1]


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_shares_are_dealt_out_without_gap_and_overlap(cpus: int) -> None:
    memory = (4 << 30) + 256 * MIB
    parts = dirtier.shares(memory=memory, cpus=cpus, parameters=PARAMETERS)
    end = FIRST
    for part in parts:
        assert part.first == end
        end = part.first + part.pages
    assert end == memory // 4096
    assert sum(part.hot for part in parts) == HOT


def test_parameters_that_no_dirtier_has_are_refused(memory: GuestMemory) -> None:
    with pytest.raises(BadConfig, match="the parameter 'stride' is missing"):
        check("dirtier", memory, cpus=1, parameters={"hot": 0})


def test_other_guests_have_no_check(memory: GuestMemory) -> None:
    assert check("hello", memory, cpus=1, parameters={}) is None
