"""Programs, and how a machine is made to run one: real mode, 64-bit mode at privilege level 3, static ELF64.

The 64-bit environment ("long64") is one that runs at full speed on every KVM, nested ones included: level 3,
RAM mapped at its own addresses with 2 MiB pages (the hole below 4 GiB too), every I/O port allowed by the
TSS. What it needs lies in the boot area, which a program may read but must leave alone::

    0x01000  PML4, then PDPT (0x2000), then GDT (0x3000)
    0x04000  per vCPU 5 pages: TSS with its I/O bitmap (3), level-0 stack (1), level-3 stack (1)
    0x54000  page directories, one per GiB up to the end of RAM
    0x9f000  end of the boot area
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
from kvmmig.machine import cpuid, elf
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.units import format_size

if TYPE_CHECKING:
    from kvmmig.kvm import Vcpu
    from kvmmig.machine.config import MachineConfig
    from kvmmig.machine.cpuid import CpuidTuple

REAL_START, REAL_END = 0x7C00, 0x9FC00  # a PC's BIOS keeps its own data above
LONG_START = 0x100000

PML4, PDPT, GDT = 0x1000, 0x2000, 0x3000
_PER_VCPU, _VCPU_PAGES = 0x4000, 5
_DIRECTORIES = 0x54000
BOOT_AREA = (0x1000, 0x9F000)

_LARGE_PAGE = 2 << 20
# Accessed and dirty are set from the start, so that the CPU never writes to the page tables.
_TABLE_ENTRY = 0x27  # present, writable, user, accessed
_PAGE_ENTRY = 0xE7  # the same, dirty, 2 MiB

_TSS_SIZE = 104
_IO_BITMAP = 8192
_KERNEL_CODE, _KERNEL_DATA, _USER_DATA, _USER_CODE, _FIRST_TSS = 0x08, 0x10, 0x18, 0x20, 0x28

_CR0 = 0x8001_0033  # PE, MP, ET, NE, WP, PG
_CR4 = 0x0620  # PAE, OSFXSR, OSXMMEXCPT
_CR4_OSXSAVE = 1 << 18
_EFER = 0x500  # LME, LMA
_ZERO = bytes(1 << 20)


class Entry(StrEnum):
    """The state in which a program finds the CPU."""

    REAL16 = "real16"  # a boot sector, or more of the same: 16-bit real mode, CS:IP 0:7c00, DL 80h
    LONG64 = "long64"  # a flat image at 1 MiB in the 64-bit environment
    ELF = "elf"  # a static ELF64 executable in the 64-bit environment


@dataclass(frozen=True)
class Program:
    """Something for a machine to run. ``parameters`` are what a toy guest was assembled with."""

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
    if program.entry is Entry.REAL16:
        _load_real(program, config, memory, vcpus)
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
    for index, vcpu in enumerate(vcpus):
        _enter_long(vcpu, index, start, config, features)


def _load_real(program: Program, config: MachineConfig, memory: GuestMemory, vcpus: Sequence[Vcpu]) -> None:
    if not 0 < len(program.image) <= REAL_END - REAL_START:
        raise BadImage(
            f"{program.name}: a real-mode image is loaded at {REAL_START:#x} and must end by {REAL_END:#x}; "
            f"{len(program.image)} bytes do not fit there"
        )
    if config.cpus > 1 and not config.irqchip:
        raise BadConfig(
            f"{program.name}: in real mode further vCPUs wait for a startup interrupt, and this machine has "
            "no interrupt controller; use one vCPU"
        )
    memory.write(REAL_START, program.image)
    sregs = vcpus[0].get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.selector = 0, 0
    vcpus[0].set_sregs(sregs)
    vcpus[0].set_regs(kvm_regs(rip=REAL_START, rsp=REAL_START, rdx=0x80, rflags=2))


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
    # null, then flat code and data at level 0, flat data and code at level 3, all of them accessed already
    gdt = struct.pack(
        "<5Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF
    )
    area = {
        PML4: struct.pack("<Q", PDPT | _TABLE_ENTRY),
        PDPT: struct.pack(f"<{n_directories}Q", *directories),
        _DIRECTORIES: pages.tobytes(),
    }
    for index in range(cpus):
        tss, kernel_stack, _ = _vcpu_area(index)
        gdt += _tss_descriptor(tss, _TSS_SIZE + _IO_BITMAP)
        area[tss] = struct.pack("<IQ90xH", 0, kernel_stack, _TSS_SIZE) + bytes(_IO_BITMAP) + b"\xff"
    area[GDT] = gdt
    return area


def _vcpu_area(index: int) -> tuple[int, int, int]:
    """Where a vCPU's TSS begins, and the tops of its level-0 and level-3 stacks."""
    start = _PER_VCPU + index * _VCPU_PAGES * PAGE_SIZE
    return start, start + 4 * PAGE_SIZE, start + 5 * PAGE_SIZE


def _tss_descriptor(base: int, limit: int) -> bytes:
    """A 64-bit TSS that is busy: the CPU has it loaded. (Intel SDM vol. 3, figure 8-4)"""
    low = (limit & 0xFFFF) | (base & 0xFFFFFF) << 16 | 0x8B << 40 | (limit >> 16) << 48 | (base >> 24) << 56
    return struct.pack("<QQ", low, base >> 32)


def _enter_long(
    vcpu: Vcpu, index: int, start: int, config: MachineConfig, features: Sequence[CpuidTuple]
) -> None:
    tss, _, stack = _vcpu_area(index)
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
        base=tss, limit=_TSS_SIZE + _IO_BITMAP, selector=_FIRST_TSS + 16 * index, type=11, present=1
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
