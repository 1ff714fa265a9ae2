"""Programs, and how a machine is made to run one: real mode, 64-bit mode at privilege level 3, static ELF64.

The 64-bit environment ("long64") is one that runs at full speed on every KVM, nested ones included: level 3,
RAM mapped at its own addresses with 2 MiB pages (the hole below 4 GiB too), every I/O port allowed by the
TSS. What it needs lies in the boot area, which a program may read but must leave alone::

    0x00000  not mapped: a null pointer is a fault
    0x01000  PML4, then PDPT (0x2000), GDT (0x3000), and the page table of the first 2 MiB (0x4000)
    0x05000  per vCPU 128 bytes: its TSS; at 0x5800 the I/O bitmap that all of them share
    0x08000  per vCPU a page: its level-0 stack
    0x18000  the vCPUs' level-3 stacks, equal shares; the lowest page of each is not mapped, to guard it
    0x5e000  page directories, one per GiB up to the end of RAM
    0x9f000  the program's parameters
    0xa0000  end of the boot area
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from kvmmig.errors import BadConfig, BadImage
from kvmmig.kvm.abi import KVM_MP_STATE_RUNNABLE, kvm_regs, kvm_segment
from kvmmig.machine import bios, cpuid, elf
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.units import format_size

if TYPE_CHECKING:
    from kvmmig.kvm import Vcpu
    from kvmmig.machine.config import MachineConfig
    from kvmmig.machine.cpuid import CpuidTuple

#: Where a program finds its parameters, 64-bit words, and how many there may be.
PARAMETERS, MOST_PARAMETERS = 0x9F000, 100
REAL_START, REAL_END = 0x7C00, PARAMETERS
LONG_START = 0x100000

PML4, PDPT, GDT, _FIRST_TABLE = 0x1000, 0x2000, 0x3000, 0x4000
_TSSS, _TSS_STEP, _IO_BITMAP = 0x5000, 128, 0x5800
_KERNEL_STACKS = 0x8000
_STACKS = (0x18000, 0x5E000)
_DIRECTORIES = 0x5E000
BOOT_AREA = (0, 0xA0000)

_LARGE_PAGE = 2 << 20
# Accessed and dirty are set from the start, so that the CPU never writes to the page tables.
_TABLE_ENTRY = 0x27  # present, writable, user, accessed
_PAGE_ENTRY = 0xE7  # the same, dirty, 2 MiB
_SMALL_PAGE_ENTRY = 0x67  # the same, 4 KiB

_TSS_SIZE = 104
_IO_BITMAP_SIZE = 8192
_KERNEL_CODE, _KERNEL_DATA, _USER_DATA, _USER_CODE, _FIRST_TSS = 0x08, 0x10, 0x18, 0x20, 0x28

_CR0 = 0x8001_0033  # PE, MP, ET, NE, WP, PG
_CR4 = 0x0620  # PAE, OSFXSR, OSXMMEXCPT
_CR4_OSXSAVE = 1 << 18
_EFER = 0x500  # LME, LMA
_ZERO = bytes(1 << 20)


class Entry(StrEnum):
    """The state in which a program finds the CPU."""

    REAL16 = "real16"  # a boot sector, a disk that begins with one, or a flat image: real mode, CS:IP 0:7c00
    LONG64 = "long64"  # a flat image at 1 MiB in the 64-bit environment
    ELF = "elf"  # a static ELF64 executable in the 64-bit environment


@dataclass(frozen=True)
class Program:
    """Something for a machine to run. ``parameters`` are a toy guest's, which it finds at `PARAMETERS`."""

    name: str
    entry: Entry
    image: bytes
    parameters: Mapping[str, int] = field(default_factory=dict)


def load(
    program: Program,
    config: MachineConfig,
    memory: GuestMemory,
    vcpus: Sequence[Vcpu],
    features: Sequence[CpuidTuple],
) -> None:
    """Put a program into memory and the vCPUs at its start. Blocking: dozens of ioctls.

    Raises `BadImage` before anything has been written, or `BadConfig` when the machine is the wrong one for
    this kind of program.
    """
    if len(program.parameters) > MOST_PARAMETERS:
        raise BadImage(f"{program.name}: a program has at most {MOST_PARAMETERS} parameters")
    if program.entry is Entry.REAL16:
        _load_real(program, config, memory, vcpus)
        memory.write(PARAMETERS, _parameter_block(program))
        return
    if program.entry is Entry.LONG64:
        segments: tuple[elf.Segment, ...] = (elf.Segment(LONG_START, program.image, len(program.image)),)
        start = LONG_START
    else:
        executable = elf.parse(program.image, program.name)
        segments, start = executable.segments, executable.entry
    for segment in segments:
        _check_place(program, segment, memory)
    for segment in segments:
        memory.write(segment.address, segment.data)
        _zero(memory, segment.address + len(segment.data), segment.size - len(segment.data))
    last = memory.regions[-1]
    for address, data in boot_area(last.gpa + last.size, config.cpus).items():
        memory.write(address, data)
    memory.write(PARAMETERS, _parameter_block(program))
    for index, vcpu in enumerate(vcpus):
        _enter_long(vcpu, index, start, config, features)


def _parameter_block(program: Program) -> bytes:
    return struct.pack(f"<{len(program.parameters)}q", *program.parameters.values())


def _load_real(program: Program, config: MachineConfig, memory: GuestMemory, vcpus: Sequence[Vcpu]) -> None:
    room = memory.size if bios.is_disk(program.image) else REAL_END - REAL_START
    if not 0 < len(program.image) <= room:
        raise BadImage(
            f"{program.name}: a real-mode image is loaded at {REAL_START:#x} and must end by {REAL_END:#x}; "
            f"{len(program.image)} bytes do not fit there"
        )
    if config.cpus > 1 and not config.irqchip:
        raise BadConfig(
            f"{program.name}: in real mode further vCPUs wait for a startup interrupt, and this machine has "
            "no interrupt controller; use one vCPU"
        )
    disk = program.image if bios.is_disk(program.image) else b""
    try:
        bios.install(memory, disk, irqchip=config.irqchip, tsc_khz=vcpus[0].get_tsc_khz())
    except ValueError as error:
        raise BadImage(f"{program.name}: {error}; give it more memory") from None
    memory.write(REAL_START, program.image[: bios.SECTOR] if disk else program.image)
    sregs = vcpus[0].get_sregs()
    sregs.cs.base, sregs.cs.selector = bios.SEGMENT << 4, bios.SEGMENT
    vcpus[0].set_sregs(sregs)
    vcpus[0].set_regs(kvm_regs(rip=bios.START, rflags=2))


def _check_place(program: Program, segment: elf.Segment, memory: GuestMemory) -> None:
    start, end = segment.address, segment.address + segment.size
    if not segment.size:
        raise BadImage(f"{program.name}: the image is empty")
    if start < BOOT_AREA[1] and end > BOOT_AREA[0]:
        raise BadImage(
            f"{program.name}: {start:#x} to {end:#x} overlaps the boot area "
            f"({BOOT_AREA[0]:#x} to {BOOT_AREA[1]:#x}); link it to {LONG_START:#x} or above"
        )
    try:
        memory.offset(start, segment.size)
    except ValueError:
        raise BadImage(
            f"{program.name}: {start:#x} to {end:#x} is not inside the guest's "
            f"{format_size(memory.size)} of memory; give it more memory or link it elsewhere"
        ) from None


def _zero(memory: GuestMemory, address: int, length: int) -> None:
    while length > 0:
        part = _ZERO[: min(length, len(_ZERO))]
        memory.write(address, part)
        address, length = address + len(part), length - len(part)


def boot_area(end: int, cpus: int) -> dict[int, bytes]:
    """What belongs into the boot area, by address: the page tables for [0, ``end``), the GDT, the TSSs."""
    pages = np.arange(0, end, _LARGE_PAGE, dtype=np.uint64) | np.uint64(_PAGE_ENTRY)
    n_directories = -(-len(pages) // 512)
    directories = [(_DIRECTORIES + i * PAGE_SIZE) | _TABLE_ENTRY for i in range(n_directories)]
    pages[0] = _FIRST_TABLE | _TABLE_ENTRY
    first = np.arange(0, _LARGE_PAGE, PAGE_SIZE, dtype=np.uint64) | np.uint64(_SMALL_PAGE_ENTRY)
    first[0] = 0
    # null, then flat code and data at level 0, flat data and code at level 3, all of them accessed already
    gdt = struct.pack(
        "<5Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF
    )
    area = {
        PML4: struct.pack("<Q", PDPT | _TABLE_ENTRY),
        PDPT: struct.pack(f"<{n_directories}Q", *directories),
        _DIRECTORIES: pages.tobytes(),
        _IO_BITMAP: bytes(_IO_BITMAP_SIZE) + b"\xff",
    }
    for index in range(cpus):
        tss = _TSSS + index * _TSS_STEP
        gdt += _tss_descriptor(tss, _tss_limit(tss))
        area[tss] = struct.pack("<IQ90xH", 0, _KERNEL_STACKS + (index + 1) * PAGE_SIZE, _IO_BITMAP - tss)
        first[stack_guard(index, cpus) // PAGE_SIZE] = 0
    area[GDT], area[_FIRST_TABLE] = gdt, first.tobytes()
    return area


def stack_guard(index: int, cpus: int) -> int:
    """The address of the page below a vCPU's level-3 stack, which is not mapped."""
    return _STACKS[0] + index * _stack_share(cpus)


def stack_size(cpus: int) -> int:
    """Bytes of each level-3 stack in a machine with ``cpus`` vCPUs: 276 KiB for one, 12 KiB for 16."""
    return _stack_share(cpus) - PAGE_SIZE


def _stack_share(cpus: int) -> int:
    return (_STACKS[1] - _STACKS[0]) // PAGE_SIZE // cpus * PAGE_SIZE


def _tss_limit(tss: int) -> int:
    """The offset of the last byte that belongs to a TSS: the one behind the I/O bitmap."""
    return _IO_BITMAP - tss + _IO_BITMAP_SIZE


def _tss_descriptor(base: int, limit: int) -> bytes:
    """A 64-bit TSS that is busy: the CPU has it loaded. (Intel SDM vol. 3, figure 8-4)"""
    low = (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | 0x8B << 40 | (limit >> 16) << 48 | (base >> 24) << 56
    return struct.pack("<QQ", low, base >> 32)


def _enter_long(
    vcpu: Vcpu, index: int, start: int, config: MachineConfig, features: Sequence[CpuidTuple]
) -> None:
    tss = _TSSS + index * _TSS_STEP
    stack = stack_guard(index, config.cpus) + _stack_share(config.cpus)
    xcr0 = cpuid.xcr0(features)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.efer = _CR0, PML4, _EFER
    sregs.cr4 = _CR4 | (_CR4_OSXSAVE if xcr0 else 0)
    data = kvm_segment(limit=0xFFFFFFFF, selector=_USER_DATA | 3, type=3, present=1, dpl=3, db=1, s=1, g=1)
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.cs = kvm_segment(
        limit=0xFFFFFFFF, selector=_USER_CODE | 3, type=11, present=1, dpl=3, s=1, l=1, g=1
    )
    sregs.tr = kvm_segment(
        base=tss, limit=_tss_limit(tss), selector=_FIRST_TSS + 16 * index, type=11, present=1
    )
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt.base, sregs.gdt.limit = GDT, _FIRST_TSS + 16 * config.cpus - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    vcpu.set_sregs(sregs)
    if xcr0:
        xcrs = vcpu.get_xcrs()
        xcrs.nr_xcrs = 1
        xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, xcr0
        vcpu.set_xcrs(xcrs)
    vcpu.set_regs(
        kvm_regs(
            rip=start,
            rsp=stack,
            rflags=2,
            rdi=index,
            rsi=config.cpus,
            rdx=config.memory,
            rcx=vcpu.get_tsc_khz(),
        )
    )
    if config.irqchip:  # else all vCPUs are runnable anyway
        mp_state = vcpu.get_mp_state()
        mp_state.mp_state = KVM_MP_STATE_RUNNABLE
        vcpu.set_mp_state(mp_state)
