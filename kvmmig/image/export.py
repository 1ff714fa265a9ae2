"""An image's guest for other tools: its memory as a flat file, or an ELF core, which gdb opens."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator

from kvmmig.errors import ImageError
from kvmmig.image.format import BLOCK_SIZE, MEMORY_AT, PAGE_SIZE
from kvmmig.image.opened import OpenImage
from kvmmig.kvm import abi

Read = Callable[[int, int], bytes]
Write = Callable[[int, bytes], object]

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _NT_PRSTATUS = 4, 62, 1, 4, 1
_READ_WRITE_RUN = 7
#: What comes before the registers in struct elf_prstatus of <linux/elfcore.h>: signals, ids, times.
_STATUS_BEFORE = 112
_PID_AT = 32
#: user_regs_struct of <sys/user.h>, by the names of KVM's structures; orig_rax has no counterpart.
_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("-", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


def regions(opened: OpenImage) -> list[tuple[int, int]]:
    """The guest's RAM: guest-physical address and bytes, in RAM order. Raises `ImageError`."""
    try:
        found = [(int(gpa), int(size)) for gpa, size in json.loads(bytes(opened.header.machine))["regions"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError("its machine's description names no regions of memory") from error
    if sum(size for _, size in found) != opened.header.n_pages * PAGE_SIZE:
        raise ImageError("its machine's description names other memory than the image has")
    return found


def export_flat(opened: OpenImage, read: Read, write: Write) -> int:
    """The memory by guest-physical address, byte for byte; returns the length that the file is to have.

    ``write(offset, data)`` is called for what is not zero. Raises `ImageError` for a block that is damaged.
    """
    end = 0
    at = 0
    placed = regions(opened)
    for gpa, size in placed:
        for offset, data in _blocks(opened, read, at, size):
            write(gpa + offset, data)
        at += size
        end = gpa + size
    return end


def export_core(opened: OpenImage, read: Read, write: Write) -> int:
    """An ELF core: a segment for each region, at its guest-physical address, and each vCPU's registers.

    As `export_flat`. Addresses are physical ones: a guest that maps memory elsewhere is seen unmapped.
    """
    placed = regions(opened)
    notes = b"".join(_status(number, state) for number, state in enumerate(_vcpus(opened)))
    first = _ELF.size + _SEGMENT.size * (len(placed) + 1)
    memory = -(-(first + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    segments = [_SEGMENT.pack(_PT_NOTE, 0, first, 0, 0, len(notes), len(notes), 4)]
    at, where = 0, memory
    for gpa, size in placed:
        segments.append(_SEGMENT.pack(_PT_LOAD, _READ_WRITE_RUN, where, gpa, gpa, size, size, PAGE_SIZE))
        for offset, data in _blocks(opened, read, at, size):
            write(where + offset, data)
        at, where = at + size, where + size
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64-bit, little-endian, version 1
    header = _ELF.pack(
        *(ident, _ET_CORE, _EM_X86_64, 1, 0, _ELF.size, 0, 0),
        *(_ELF.size, _SEGMENT.size, len(segments), 0, 0, 0),
    )
    write(0, header + b"".join(segments) + notes)
    return where


def _blocks(opened: OpenImage, read: Read, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The blocks with data of one region, which begins ``start`` bytes into RAM: where in it, and what."""
    for block in opened.data_blocks():
        at = block * BLOCK_SIZE - start
        if 0 <= at < size:
            data = read(MEMORY_AT + block * BLOCK_SIZE, BLOCK_SIZE)
            if problem := opened.check_block(block, memoryview(data)):
                raise ImageError(problem)
            yield at, data


def _vcpus(opened: OpenImage) -> Iterator[tuple[abi.kvm_regs, abi.kvm_sregs]]:
    state = {section.name: section.data for section in opened.sections}
    number = 0
    while f"cpu{number}/regs" in state:
        try:
            yield (
                abi.kvm_regs.from_buffer_copy(state[f"cpu{number}/regs"]),
                abi.kvm_sregs.from_buffer_copy(state[f"cpu{number}/sregs"]),
            )
        except (KeyError, ValueError) as error:
            raise ImageError(f"the registers of vCPU {number} are not whole") from error
        number += 1


def _status(number: int, state: tuple[abi.kvm_regs, abi.kvm_sregs]) -> bytes:
    """An NT_PRSTATUS note: what a debugger takes for a thread."""
    before = bytearray(_STATUS_BEFORE)
    before[_PID_AT : _PID_AT + 4] = (number + 1).to_bytes(4, "little")
    registers = struct.pack(f"<{len(_REGISTERS)}Q", *(_register(name, *state) for name in _REGISTERS))
    status = bytes(before) + registers + bytes(8)  # whether there is floating point, and padding
    return struct.pack("<III8s", 5, len(status), _NT_PRSTATUS, b"CORE") + status


def _register(name: str, regs: abi.kvm_regs, sregs: abi.kvm_sregs) -> int:
    if name == "-":
        return (1 << 64) - 1  # as the kernel has it outside of a system call
    if name.endswith("_base"):
        return int(getattr(sregs, name.removesuffix("_base")).base)
    if hasattr(sregs, name):
        return int(getattr(sregs, name).selector)
    return int(getattr(regs, name))
