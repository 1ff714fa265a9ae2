"""Images: what is loaded where, and what is refused with which words."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadConfig, BadImage
from kvmmig.machine import Entry, GuestMemory, Machine, MachineConfig, Program, boot

SMALL = MachineConfig(memory=8 << 20)
C_SOURCE = r"""
static const char text[] = "hello from C, ";
static char zero[0x180000];
static int data = 41;

static void outb(unsigned short port, unsigned char value) {
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

void _start(long index, long cpus, long memory, long khz) {
    __asm__ volatile("andq $-16, %rsp");
    for (const char *c = text; *c; c++) outb(0x3f8, *c);
    for (unsigned i = 0; i < sizeof zero; i++) if (zero[i]) outb(0xf4, 1);
    outb(0x3f8, '0' + cpus);
    data++;
    outb(0xf4, data);
    for (;;) ;
}
"""

Compile = Callable[..., bytes]


@pytest.fixture
def compile_c(tmp_path: Path) -> Compile:
    """Compile `C_SOURCE`, with more gcc options if given."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")

    def compile_with(*options: str) -> bytes:
        source, target = tmp_path / "guest.c", tmp_path / "guest"
        source.write_text(C_SOURCE)
        base = ["gcc", "-O1", "-ffreestanding", "-nostdlib", "-fno-stack-protector", "-mno-red-zone"]
        subprocess.run([*base, *options, "-o", target, source], check=True)
        return target.read_bytes()

    return compile_with


@pytest.mark.kvm
async def test_a_static_elf_executable_runs_with_data_and_zeroed_bss(compile_c: Compile) -> None:
    program = Program("guest", Entry.ELF, compile_c("-static", "-no-pie"))
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            # what a load before this one left must not be seen in bss
            await machine.load(Program("dirt", Entry.LONG64, b"\xff" * (6 << 20)))
            await machine.load(program)
            await machine.start()
            ending = await machine.wait()
    assert (ending.kind, ending.status, bytes(output)) == ("exit", 42, b"hello from C, 1")


@pytest.mark.kvm
async def test_parameters_of_the_program_travel_in_the_description() -> None:
    config = MachineConfig(memory=4 << 20, parameters={"a": 1, "b": 2})
    async with Machine.open(config) as machine:
        await machine.load(Program("x", Entry.LONG64, b"\xeb\xfe", {"b": 3, "c": 4}))
        assert machine.description.parameters == {"a": 1, "b": 3, "c": 4}


def load(program: Program, config: MachineConfig = SMALL) -> None:
    """Only for programs that are refused before any vCPU is touched."""
    memory = GuestMemory(config.memory)
    try:
        boot.load(program, config, memory, (), ())
    finally:
        memory.close()


def test_a_position_independent_executable_is_refused(compile_c: Compile) -> None:
    with pytest.raises(BadImage, match="position-independent or a library; link it with gcc -static"):
        load(Program("guest", Entry.ELF, compile_c("-pie", "-fPIE")))


def test_a_dynamically_linked_executable_is_refused() -> None:
    image = header(phnum=1) + program_header(kind=3)
    with pytest.raises(BadImage, match="dynamically linked"):
        load(Program("guest", Entry.ELF, image))


def header(
    *,
    ident: bytes = b"\x7fELF\x02\x01\x01",
    kind: int = 2,
    machine: int = 62,
    entry: int = 0x200000,
    phentsize: int = 56,
    phnum: int = 0,
) -> bytes:
    return struct.pack(
        "<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, phentsize, phnum, 0, 0, 0
    )


def program_header(
    *,
    kind: int = 1,
    offset: int = 0,
    virtual: int = 0x200000,
    physical: int | None = None,
    in_file: int = 16,
    in_memory: int = 32,
) -> bytes:
    physical = virtual if physical is None else physical
    return struct.pack("<IIQQQQQQ", kind, 5, offset, virtual, physical, in_file, in_memory, 4096)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"#!/bin/sh\n", "this is not an ELF file; for a flat image choose real16 or long64"),
        (header()[:40], "ends inside its header after 40 bytes"),
        (header(ident=b"\x7fELF\x01\x01\x01"), "not a 64-bit little-endian ELF file"),
        (header(ident=b"\x7fELF\x02\x02\x01"), "not a 64-bit little-endian ELF file"),
        (header(machine=183), "for machine 183, not for x86-64"),
        (header(kind=1), "not an executable"),
        (header(phentsize=32), "program headers have 32 bytes each"),
        (header(phnum=2) + program_header(), "truncated: it ends inside its program headers"),
        (
            header(phnum=1) + program_header(in_file=4096, in_memory=4096),
            "truncated: it ends inside segment 0",
        ),
        (header(phnum=1) + program_header(in_file=64, in_memory=32), "more bytes in the file than in memory"),
        (header(phnum=1) + program_header(physical=0x300000), "both must be the same"),
        (header(phnum=1, entry=0x200020) + program_header(), "its entry point 0x200020 is in none"),
        (header(), "its entry point 0x200000 is in none"),
        (
            header(phnum=1, entry=0x9E000) + program_header(virtual=0x9E000, in_memory=0x4000),
            "0x9e000 to 0xa2000 overlaps the boot area",
        ),
        (
            header(phnum=1, entry=0x7FFFF0) + program_header(virtual=0x7FFFF0),
            "0x7ffff0 to 0x800010 is not inside the guest's 8 MiB of memory",
        ),
        (
            header(phnum=1, entry=1 << 63) + program_header(virtual=1 << 63),
            "is not inside the guest's 8 MiB of memory",
        ),
    ],
)
def test_an_elf_file_that_cannot_be_loaded_is_refused_in_one_sentence(image: bytes, message: str) -> None:
    with pytest.raises(BadImage) as caught:
        load(Program("guest", Entry.ELF, image))
    assert message in str(caught.value)
    assert str(caught.value).startswith("guest: ")


def test_a_real_mode_image_may_fill_conventional_memory_and_no_more() -> None:
    with pytest.raises(BadImage, match="must end by 0x9f000; 619521 bytes do not fit"):
        load(Program("big", Entry.REAL16, bytes(0x97400 + 1)))


@pytest.mark.parametrize("entry", [Entry.REAL16, Entry.LONG64])
def test_an_empty_image_is_refused(entry: Entry) -> None:
    with pytest.raises(BadImage):
        load(Program("empty", entry, b""))


def test_a_flat_image_must_fit_into_memory() -> None:
    with pytest.raises(BadImage, match=r"0x100000 to 0x100001 is not inside the guest's 1 MiB"):
        load(Program("big", Entry.LONG64, b"\x90"), MachineConfig(memory=1 << 20))


def test_several_vcpus_in_real_mode_need_an_irqchip() -> None:
    with pytest.raises(BadConfig, match="no interrupt controller; use one vCPU"):
        load(Program("x", Entry.REAL16, b"\xf4"), MachineConfig(memory=1 << 20, cpus=2, irqchip=False))


def words(data: bytes) -> list[int]:
    return [word for (word,) in struct.iter_unpack("<Q", data)]


@pytest.mark.parametrize("end", [4 << 20, (4 << 20) + (256 << 10), 3 << 30, (4 << 30) + 1, 65 << 30])
def test_every_address_up_to_the_end_of_ram_is_mapped_to_itself_for_level_3(end: int) -> None:
    area = boot.boot_area(end, 1)
    directories, first_table = 0x5E000, 0x4000

    def entry(table: int, index: int) -> int:
        if table >= directories:
            entries = words(area[directories][table - directories :][:4096])
        else:
            entries = words(area[table])
        return entries[index] if index < len(entries) else 0

    def translate(address: int) -> int | None:
        table = boot.PML4
        for shift in (39, 30):
            found = entry(table, address >> shift & 511)
            if not found & 1:
                return None
            assert found & 0xFFF == 0x27
            table = found & ~0xFFF
        found = entry(table, address >> 21 & 511)
        if not found & 1:
            return None
        if found & ~0xFFF == first_table:
            found = entry(first_table, address >> 12 & 511)
            assert found & 0xFFF in (0, 0x67)
            return found & ~0xFFF | address & 0xFFF if found & 1 else None
        assert found & 0xFFF == 0xE7
        return found & ~0x1FFFFF | address & 0x1FFFFF

    for address in (0x1000, 0x100000, end // 2, 0xFEE00000, 1 << 32, end - 1):
        if address < end:
            assert translate(address) == address
    assert translate(-(-end // (2 << 20)) * (2 << 20)) is None
    assert translate(0) is None
    assert translate(boot.stack_guard(0, 1)) is None


@pytest.mark.parametrize("cpus", [1, 2, 3, 16])
def test_below_every_stack_there_is_a_page_that_is_not_mapped(cpus: int) -> None:
    table = words(boot.boot_area(4 << 20, cpus)[0x4000])
    missing = {page * 4096 for page, entry in enumerate(table) if not entry & 1}
    guards = [boot.stack_guard(index, cpus) for index in range(cpus)]
    assert missing == {0, *guards}
    assert boot.stack_size(cpus) >= 12 << 10
    tops = [guard + 4096 + boot.stack_size(cpus) for guard in guards]
    assert tops[:-1] == guards[1:]
    assert tops[-1] <= 0x5E000


def test_the_boot_area_has_room_for_sixteen_vcpus_and_the_most_memory_and_nothing_overlaps() -> None:
    taken = boot.BOOT_AREA[0]
    for address, data in sorted(boot.boot_area(65 << 30, 16).items()):
        assert address >= taken
        taken = address + len(data)
    assert taken <= boot.BOOT_AREA[1]
