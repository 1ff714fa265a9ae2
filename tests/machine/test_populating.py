"""Memory that is touched ahead of whoever uses it, and a reserve for a guest that is yet to come."""

from __future__ import annotations

import mmap
from pathlib import Path

from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.populating import Populating, Reserve, anonymous

MIB = 1 << 20


def resident(mapping: mmap.mmap) -> int:
    """Bytes of this mapping that the kernel has found memory for: Rss of proc_pid_smaps(5)."""
    address = Populating(mapping)._base
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    return 0


def test_all_of_it_is_touched_and_nothing_is_changed() -> None:
    mapping = anonymous(16 * MIB)
    mapping[5 * MIB] = 7
    populating = Populating(mapping)
    populating.wait()
    populating.check()
    assert populating.done == 16 * MIB
    assert mapping[5 * MIB] == 7
    assert resident(mapping) >= 16 * MIB


def test_memory_is_usable_and_can_be_closed_while_it_is_populated() -> None:
    memory = GuestMemory(256 * MIB)
    memory.populate()
    memory.write(200 * MIB, b"x")
    assert memory.read(200 * MIB, 1) == b"x"
    memory.close()


def test_a_reserve_becomes_memory_of_the_size_that_the_guest_has() -> None:
    for size in (8 * MIB, 4 * MIB, 16 * MIB):
        reserve = Reserve(8 * MIB)
        assert reserve.size == 8 * MIB
        memory = GuestMemory(size, reserve)
        assert reserve.size == 0
        memory.write(size - 1, b"x")
        assert memory.words.any(), "it is this guest's, to its last byte"
        memory.close()
        reserve.close()


def test_a_reserve_that_is_taken_twice_is_memory_for_both() -> None:
    reserve = Reserve(2 * MIB)
    one, two = GuestMemory(2 * MIB, reserve), GuestMemory(2 * MIB, reserve)
    one.write(0, b"x")
    assert two.read(0, 1) == b"\0"
    one.close()
    two.close()
