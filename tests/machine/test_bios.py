"""The host's half of the BIOS: what a disk's image is taken for, and requests that make no sense."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmig.machine import GuestMemory, bios

REQUEST, DISK, MIB = 0xF2040, 0xF2020, 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory(4 * MIB)
    yield made
    made.close()


def port(memory: GuestMemory, said: list[str] | None = None) -> bios.BiosPort:
    made = bios.BiosPort((said if said is not None else []).append)
    made.memory = memory
    return made


def ask(memory: GuestMemory, command: int, sector: int, address: int, count: int) -> int:
    """The status that the guest would find."""
    memory.write(REQUEST, struct.pack("<IIHB", sector, address, count, 0xEE))
    port(memory).write(bios.PORT, command)
    return memory.read(REQUEST + 10, 1)[0]


@pytest.mark.parametrize(
    ("size", "tracks", "heads", "sectors", "drive"),
    [
        (1440 << 10, 80, 2, 18, 0x00),
        (360 << 10, 40, 2, 9, 0x00),
        (512, 3, 16, 63, 0x80),
        (100 << 20, 204, 16, 63, 0x80),
        (2 << 30, 1024, 16, 63, 0x80),
    ],
)
def test_an_image_is_taken_for_a_floppy_by_its_size_and_else_for_a_disk(
    size: int, tracks: int, heads: int, sectors: int, drive: int
) -> None:
    assert bios.Geometry.of(size) == bios.Geometry(tracks, heads, sectors, drive)


def test_sectors_are_read_and_written_and_those_behind_the_image_hold_zeros(memory: GuestMemory) -> None:
    at = bios.install(memory, b"\x11" * 512 + b"\x22" * 512, irqchip=True, tsc_khz=1)
    memory.write(0x8000, b"\xff" * 1536)
    assert ask(memory, 1, 0, 0x8000, 3) == 0x00
    assert memory.read(0x8000, 1536) == b"\x11" * 512 + b"\x22" * 512 + bytes(512)
    memory.write(0x8000, b"\x33" * 512)
    assert ask(memory, 2, 1, 0x8000, 1) == 0x00
    assert memory.read(at, 1024) == b"\x11" * 512 + b"\x33" * 512
    assert ask(memory, 2, 2, 0x8000, 1) == 0x04
    assert ask(memory, 1, 10_000_000, 0x8000, 1) == 0x04
    assert ask(memory, 1, 0, 4 * MIB - 512, 2) == 0x09


def test_a_disk_that_does_not_fit_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="do not fit into the memory beyond the first 1 MiB"):
        bios.install(memory, bytes(3 * MIB + 1), irqchip=True, tsc_khz=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    command=st.integers(0, 255),
    request=st.binary(min_size=16, max_size=16),
    disk=st.binary(min_size=8, max_size=8),
)
def test_whatever_a_guest_writes_there_raises_nothing(
    memory: GuestMemory, command: int, request: bytes, disk: bytes
) -> None:
    said: list[str] = []
    memory.write(REQUEST, request)
    memory.write(DISK, disk)
    port(memory, said).write(bios.PORT, command)
    assert len(said) == (command == 3)


@pytest.mark.parametrize(
    ("vector", "ax", "says"),
    [
        (0x00, 0, "it divided by zero, or by so little that the result has no room, at 1234:5678"),
        (0x10, 0x0013, "before 1234:5678 (AX=0013h BX=0000h CX=0000h DX=0000h): video mode 13h, graphics"),
        (0x21, 0x0900, "it called int 21h with AH=09h before 1234:5678"),
        (0x80, 4, "Linux; a boot sector has no Linux beneath it"),
        (0x5F, 0, "which the small BIOS here has not got"),
    ],
)
def test_what_nobody_serves_is_named(vector: int, ax: int, says: str) -> None:
    assert says in bios.unserved(vector, ax, 0, 0, 0, 0x5678, 0x1234)


def test_the_shipped_bios_is_what_nasm_makes_of_its_source() -> None:
    from importlib import resources
    from pathlib import Path

    from kvmmig.guests import assemble
    from tests.assembling import need_nasm

    need_nasm()
    folder = Path(str(resources.files(bios)))
    made = assemble((folder / "bios.asm").read_text(), name="bios.asm", directory=folder)
    assert made == (folder / "bios.bin").read_bytes(), 'say "make guests", and commit bios.bin'
