"""Exits of one's own, and what docs/guests.md says of them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import kvmmig
import kvmmig.kvm
from kvmmig.machine import Ending, Entry, Machine, MachineConfig, Program
from tests.assembling import assembled

pytestmark = pytest.mark.kvm

PAGE = Path(__file__).parents[2] / "docs/guests.md"
CONFIG = MachineConfig(memory=4 << 20)


def guest(source: str) -> Program:
    return Program("own", Entry.LONG64, assembled(source, bits=64, origin=0x100000))


async def test_a_port_of_ones_own_is_written_and_read_and_others_are_as_before() -> None:
    written = []

    def on_exit(exit_: kvmmig.kvm.Exit) -> bytes | None:
        match exit_:
            case kvmmig.kvm.IoOut(port=0x510, data=data):
                written.append(data)
                return b""
            case kvmmig.kvm.IoIn(port=0x510, size=2):
                return b"\x2a\x00"
        return None

    source = "mov dx, 0x510; mov eax, 0x12345678; out dx, eax; in ax, dx; out 0xe9, al; out 0xf4, al"
    printed = bytearray()
    with trio.fail_after(30):
        async with Machine.open(CONFIG, output=printed.extend, on_exit=on_exit) as machine:
            await machine.load(guest(source))
            await machine.start()
            assert await machine.wait() == Ending("exit", 42)
    assert (written, printed) == ([b"\x78\x56\x34\x12"], bytearray(b"\x2a"))


async def test_an_address_of_ones_own_is_read_where_there_is_no_ram() -> None:
    def on_exit(exit_: kvmmig.kvm.Exit) -> bytes | None:
        return b"\x07" if isinstance(exit_, kvmmig.kvm.MmioRead) else None

    config = MachineConfig(memory=(4 << 20) + (256 << 10))  # the rest of its last 2 MiB is mapped, and no RAM
    with trio.fail_after(30):
        async with Machine.open(config, on_exit=on_exit) as machine:
            await machine.load(guest("mov al, [0x4ff000]; out 0xf4, al"))
            await machine.start()
            assert await machine.wait() == Ending("exit", 7)


async def test_what_raises_ends_the_guest_with_a_report() -> None:
    def on_exit(exit_: kvmmig.kvm.Exit) -> bytes | None:
        raise LookupError("which port")

    with trio.fail_after(30):
        async with Machine.open(CONFIG, on_exit=on_exit) as machine:
            await machine.load(guest("out 0xe9, al"))
            await machine.start()
            ending = await machine.wait()
    assert ending.kind == "crash"
    assert "LookupError: which port" in ending.report


async def test_the_page_s_guest_is_saved_when_it_asks(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"trio": trio, "kvmmig": kvmmig}
    exec(snippet, names)
    save_on_request: Callable[[str, str], Awaitable[None]] = names["save_on_request"]
    code = assembled("mov dx, 0x510; out dx, al; again: pause; inc ecx; jmp again", bits=64, origin=0x100000)
    source = tmp_path / "asks.asm"
    source.write_text("; asks: to be saved\n;@ entry long64\n    db " + ", ".join(map(str, code)))
    with trio.fail_after(30):
        await save_on_request(str(source), f"{tmp_path}/saved.img")
        async with kvmmig.receive(f"file:{tmp_path}/saved.img") as machine:
            assert machine.state is kvmmig.State.RUNNING
