"""A static ELF64 executable, taken apart. (System V ABI, chapters 4 and 5; its AMD64 supplement)"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmmig.errors import BadImage

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes for guest memory at ``address``; what ``size`` has beyond ``data`` is zero."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Executable:
    """What is to be loaded, and the address of the first instruction."""

    entry: int
    segments: tuple[Segment, ...]


def parse(image: bytes, name: str) -> Executable:
    """Take an executable apart. Raises `BadImage` when it is not a static ELF64 one for x86-64."""
    advice = "link it with gcc -static -no-pie -nostdlib"
    if image[:4] != b"\x7fELF":
        raise BadImage(f"{name}: this is not an ELF file; for a flat image choose real16 or long64")
    if len(image) < _HEADER.size:
        raise BadImage(f"{name}: the ELF file ends inside its header after {len(image)} bytes")
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(image)
    if ident[4] != 2 or ident[5] != 1:
        raise BadImage(f"{name}: this is not a 64-bit little-endian ELF file; compile it for x86-64")
    if machine != _EM_X86_64:
        raise BadImage(f"{name}: this ELF file is for machine {machine}, not for x86-64 ({_EM_X86_64})")
    if kind == _ET_DYN:
        raise BadImage(f"{name}: this ELF file is position-independent or a library; {advice}")
    if kind != _ET_EXEC:
        raise BadImage(f"{name}: this ELF file is not an executable (its type is {kind}); {advice}")
    if entry_size != _PROGRAM_HEADER.size:
        raise BadImage(
            f"{name}: its program headers have {entry_size} bytes each instead of {_PROGRAM_HEADER.size}"
        )
    if table + count * entry_size > len(image):
        raise BadImage(f"{name}: the ELF file is truncated: it ends inside its program headers")

    segments = []
    for index in range(count):
        fields = _PROGRAM_HEADER.unpack_from(image, table + index * entry_size)
        segment_kind, _, offset, virtual, physical, in_file, in_memory, _ = fields
        if segment_kind in (_PT_DYNAMIC, _PT_INTERP):
            raise BadImage(f"{name}: this ELF file is dynamically linked; {advice}")
        if segment_kind != _PT_LOAD or not in_memory:
            continue
        if physical != virtual:
            raise BadImage(
                f"{name}: segment {index} is linked to {virtual:#x} and to be loaded at {physical:#x}; "
                "memory is mapped one to one here, so both must be the same"
            )
        if in_file > in_memory:
            raise BadImage(f"{name}: segment {index} has more bytes in the file than in memory")
        if offset + in_file > len(image):
            raise BadImage(f"{name}: the ELF file is truncated: it ends inside segment {index}")
        segments.append(Segment(virtual, image[offset : offset + in_file], in_memory))
    if not any(segment.address <= entry < segment.address + segment.size for segment in segments):
        raise BadImage(f"{name}: its entry point {entry:#x} is in none of its segments")
    return Executable(entry, tuple(segments))
