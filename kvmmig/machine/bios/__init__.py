"""A small BIOS for boot sectors, in assembler (bios.asm and its parts), and the host's half of it.

A real-mode program finds the services that public boot sectors use. Its disk is the image that it came in, at
the end of its memory below 4 GiB, so the disk moves with the guest; so does all else that the BIOS knows. The
host copies sectors when it is asked to, at port 0x1b0, and says what it was that nobody served.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from kvmmig.machine.memory import HOLE, PAGE_SIZE, GuestMemory

SECTOR = 512
#: Where the BIOS lies, and its first instruction.
SEGMENT, START = 0xF000, 0x500
PORT = 0x1B0

_BASE = SEGMENT << 4
_LOW_COPY = 0x500  # interrupt vectors and the BIOS data area
_HOST_DATA = _BASE + 0x2000
_DATA = struct.Struct("<IHHHBBIII")
_DISK_AT, _DISK = _HOST_DATA + 0x20, struct.Struct("<II")  # which the BIOS itself does not need
_REQUEST_AT, _REQUEST, _STATUS_AT = _HOST_DATA + 0x40, struct.Struct("<IIH"), _HOST_DATA + 0x4A
_LAST_WORDS_AT, _LAST_WORDS = _HOST_DATA + 0x60, struct.Struct("<7H")
_READ, _WRITE, _REPORT = 1, 2, 3
_FINE, _NO_SUCH_SECTOR, _WRONG_ADDRESS = 0x00, 0x04, 0x09

_FLOPPIES: Mapping[int, tuple[int, int, int]] = {
    360: (40, 2, 9),
    720: (80, 2, 9),
    1200: (80, 2, 15),
    1440: (80, 2, 18),
    2880: (80, 2, 36),
}
_FLOPPY_SECTORS = 2880
_DEVICE_VECTORS = (0x02, *range(0x08, 0x10), 0x1C, *range(0x70, 0x78))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a disk's image is taken for: a floppy where it has the size of one, else a hard disk."""

    tracks: int
    heads: int
    sectors: int  # of a track
    drive: int

    @classmethod
    def of(cls, size: int) -> Geometry:
        """Of an image of ``size`` bytes."""
        if size % 1024 == 0 and size // 1024 in _FLOPPIES:
            return cls(*_FLOPPIES[size // 1024], 0x00)
        # Whoever writes a small one reads past its end: those sectors are there, and hold zeros.
        sectors = max(-(-size // SECTOR), _FLOPPY_SECTORS)
        return cls(min(-(-sectors // (16 * 63)), 1024), 16, 63, 0x80)

    @property
    def all_sectors(self) -> int:
        return self.tracks * self.heads * self.sectors


def is_disk(image: bytes) -> bool:
    """Is it a boot sector, or a disk that begins with one?"""
    return image[510:512] == b"\x55\xaa"


def install(memory: GuestMemory, disk: bytes, *, irqchip: bool, tsc_khz: int) -> int:
    """Put the BIOS into memory, and its disk. Returns the guest-physical address at which the disk begins.

    Raises `ValueError` where the memory has no room for the disk.
    """
    low = min(memory.size, HOLE[0])
    at = low - -(-len(disk) // PAGE_SIZE) * PAGE_SIZE
    if disk and at < 1 << 20:
        raise ValueError(f"its {len(disk)} bytes do not fit into the memory beyond the first 1 MiB")
    image = _image()
    memory.write(_BASE, image)
    memory.write(0, image[:_LOW_COPY])
    memory.write(at, disk)
    geometry = Geometry.of(len(disk))
    data = _DATA.pack(
        geometry.all_sectors,
        geometry.tracks,
        geometry.heads,
        geometry.sectors,
        geometry.drive,
        irqchip,
        tsc_khz,
        at,
        (memory.size - low) // 1024,
    )
    memory.write(_HOST_DATA, data)
    memory.write(_DISK_AT, _DISK.pack(at, len(disk)))
    return at


def has_all_interrupts(memory: GuestMemory) -> bool:
    """Do all interrupts from devices lead to the BIOS's own handlers, which do nothing more?"""
    handlers = struct.unpack("<512H", memory.read(0, 1024))
    mine = struct.unpack("<512H", _image()[:1024])
    return all(
        handlers[2 * vector : 2 * vector + 2] == mine[2 * vector : 2 * vector + 2]
        for vector in _DEVICE_VECTORS
    )


class BiosPort:
    """Port 0x1b0, at which the BIOS asks for sectors, and tells of a call that nobody serves.

    It has no state: all is in guest memory, which the guest may change as it likes, so nothing there is
    trusted. ``on_unserved`` gets a sentence for people. ``memory`` is set when there is some.
    """

    ports = (PORT,)
    memory: GuestMemory

    def __init__(self, on_unserved: Callable[[str], None]) -> None:
        self._on_unserved = on_unserved

    def read(self, port: int) -> int:
        return 0xFF

    def write(self, port: int, value: int) -> None:
        try:
            if value in (_READ, _WRITE):
                status = self._copy(writing=value == _WRITE)
                self.memory.write(_STATUS_AT, bytes((status,)))
            elif value == _REPORT:
                words = _LAST_WORDS.unpack(self.memory.read(_LAST_WORDS_AT, _LAST_WORDS.size))
                self._on_unserved(unserved(*words))
        except ValueError:
            return  # it has less memory than a BIOS needs, so there is none

    def _copy(self, *, writing: bool) -> int:
        first, address, count = _REQUEST.unpack(self.memory.read(_REQUEST_AT, _REQUEST.size))
        at, size = _DISK.unpack(self.memory.read(_DISK_AT, _DISK.size))
        if first + count > Geometry.of(size).all_sectors:
            return _NO_SUCH_SECTOR
        start, length = first * SECTOR, count * SECTOR
        stored = max(min(length, size - start), 0)  # what lies behind the image holds zeros
        try:
            if not writing:
                data = self.memory.read(at + start, stored) if stored else b""
                self.memory.write(address, data.ljust(length, b"\0"))
            elif stored < length:
                return _NO_SUCH_SECTOR
            else:
                self.memory.write(at + start, self.memory.read(address, length))
        except ValueError:
            return _WRONG_ADDRESS
        return _FINE


_FAULTS: Mapping[int, str] = {
    0x00: "divided by zero, or by so little that the result has no room",
    0x01: "came to a breakpoint: its trap flag is set",
    0x03: "came to an int3 instruction: a breakpoint",
    0x04: "overflowed (into)",
    0x05: "left the bounds of an array, or asked for a printout (int 05h)",
    0x06: "came to bytes that are no instruction",
    0x07: "used the FPU, which it has switched off",
    0x08: "faulted twice",
    0x0B: "used a segment that is not there",
    0x0C: "went beyond the end of its stack segment",
    0x0D: "went beyond the end of a segment, or used an instruction that is not allowed there",
}
_WHAT_IT_IS: Mapping[int, str] = {
    0x10: "the screen, which here is the serial port and has text only",
    0x13: "the disk",
    0x15: "the machine",
    0x16: "the keyboard",
    0x17: "the printer, of which there is none",
    0x18: "what a PC does without a disk to start from",
    0x1A: "the clock",
    0x20: "DOS; a boot sector has no DOS beneath it, so use the BIOS: int 10h to print",
    0x21: "DOS; a boot sector has no DOS beneath it, so use the BIOS: int 10h to print",
    0x33: "the mouse, of which there is none",
    0x80: "Linux; a boot sector has no Linux beneath it, so use the BIOS: int 10h to print",
}


def unserved(vector: int, ax: int, bx: int, cx: int, dx: int, ip: int, cs: int) -> str:
    """What nobody served, in words. The registers are the caller's."""
    where = f"{cs:04x}:{ip:04x}"
    if vector in _FAULTS:
        return f"it {_FAULTS[vector]}, at {where}"
    registers = f"AX={ax:04x}h BX={bx:04x}h CX={cx:04x}h DX={dx:04x}h"
    what = _WHAT_IT_IS.get(vector, "which the small BIOS here has not got")
    if vector == 0x10 and not ax >> 8:
        what = f"video mode {ax & 0xFF:02x}h, graphics; there is no screen here, only text on the serial port"
    return f"it called int {vector:02x}h with AH={ax >> 8:02x}h before {where} ({registers}): {what}"


@cache
def _image() -> bytes:
    return resources.files(__package__).joinpath("bios.bin").read_bytes()
