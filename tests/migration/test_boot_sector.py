"""A boot sector for real hardware moves: real mode, then 32-bit flat, A20 through port 0x92, and a byte of
every page counted up, in order, for ever. Wherever it is stopped, the bytes tell of one moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

from kvmmig.machine import Entry, Machine, MachineConfig, Program
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from tests.assembling import assembled

pytestmark = pytest.mark.kvm

MIB = 1 << 20
FIRST, LAST, SIZE = 1 * MIB, 12 * MIB, 16 * MIB

SECTOR = f"""
    cli
    xor ax, ax
    mov ds, ax
    in al, 0x92
    or al, 2
    out 0x92, al
    lgdt [gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 8:flat
    bits 32
flat:
    mov ax, 0x10
    mov ds, ax
    mov dx, 0x3f8
    mov al, 'A'
    out dx, al
pass:
    mov eax, {FIRST}
page:
    inc byte [eax]
    add eax, 4096
    cmp eax, {LAST}
    jb page
    mov al, 'B'
    out dx, al
    jmp pass
    align 8
gdt:
    dq 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:
    dw 23
    dd gdt
    times 510 - ($ - $$) db 0
    dw 0xaa55
"""


async def consistent(machine: Machine) -> int:
    """The count in the last page; all others are the same, or one more up to some page."""
    await machine.pause()
    counts = np.array(machine.memory.words[FIRST // 4096 : LAST // 4096, 0] & np.uint64(0xFF), np.uint8)
    ahead = counts - counts[-1]
    assert set(ahead.tolist()) <= {0, 1}
    assert (np.diff(ahead.astype(int)) <= 0).all(), "those ahead come first"
    return int(counts[-1])


@pytest.mark.parametrize("scheme", ["tcp", "pipe", "file"])
async def test_a_boot_sector_moves_and_its_memory_is_of_one_moment(scheme: str, tmp_path: Path) -> None:
    program = Program("boot", Entry.REAL16, assembled(SECTOR, bits=16, origin=0x7C00))
    where = "tcp:127.0.0.1:0" if scheme == "tcp" else f"{scheme}:{tmp_path}/guest.img"
    printed = bytearray()
    async with Machine.open(MachineConfig(memory=SIZE), output=printed.extend) as source:
        await source.load(program)
        await source.start()
        with trio.fail_after(60):
            while printed.count(b"B") < 2:  # noqa: ASYNC110  # the output comes from a vCPU's thread
                await trio.sleep(0.01)
        assert printed.startswith(b"AB")
        async with trio.open_nursery() as nursery:
            later = bytearray()
            incoming = IncomingMigration(where, output=later.extend)
            if scheme == "tcp":
                incoming = IncomingMigration(
                    where,
                    output=later.extend,
                    on_listening=lambda uri: nursery.start_soon(OutgoingMigration(source, str(uri)).run),
                )
            else:
                await OutgoingMigration(source, where).run()
            async with incoming.machine() as machine:
                with trio.fail_after(60):
                    while later.count(b"B") < 3:  # noqa: ASYNC110  # likewise
                        await trio.sleep(0.01)
                assert await consistent(machine) >= 3
                assert set(later) == {ord("B")}
