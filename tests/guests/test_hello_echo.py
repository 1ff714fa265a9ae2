"""The guests that talk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.guests.conftest import Move, Run

pytestmark = pytest.mark.kvm

GREETING = "Type, and I type it back. Ctrl-D ends me.\r\n"


@pytest.mark.parametrize("cpus", [1, 2])
async def test_hello_prints_its_line_once_and_ends(run: Run, cpus: int) -> None:
    async with run("hello", cpus=cpus) as running:
        ending = await running.machine.wait()
        assert (ending.kind, ending.status) == ("exit", 0)
        assert running.screen.text == "Hello from a KVM guest at privilege level 3.\n"


async def test_echo_greets_types_back_and_ends_on_ctrl_d(run: Run) -> None:
    async with run("echo") as running:
        await running.screen.until(lambda text: text == GREETING)
        await running.machine.feed(b"hello there\r")
        await running.screen.until(lambda text: text == GREETING + "hello there\r\n")
        await running.machine.feed(b"\x04")
        ending = await running.machine.wait()
        assert (ending.kind, ending.status) == ("exit", 0)


async def test_echo_gets_what_was_typed_before_it_was_ready(run: Run) -> None:
    async with run("echo") as running:
        await running.machine.feed(b"early")
        await running.screen.until(lambda text: text == GREETING + "early")


async def test_echo_loses_nothing_of_a_long_text(run: Run) -> None:
    typed = bytes(32 + i % 95 for i in range(6000))
    async with run("echo") as running:
        await running.machine.feed(typed)
        await running.screen.until(lambda text: len(text) >= len(GREETING) + len(typed))
        assert running.screen.text == GREETING + typed.decode()


async def test_echo_goes_on_in_another_machine(run: Run, move: Move) -> None:
    async with run("echo") as running:
        await running.machine.feed(b"here")
        await running.screen.until(lambda text: text == GREETING + "here")
        await running.machine.pause()
        assert running.machine.serial.feed(b"and ") == 4  # in flight when the state is captured
        async with move(running) as moved:
            await moved.machine.feed(b"there\x04")
            assert (await moved.machine.wait()).status == 0
            assert running.screen.text + moved.screen.text == GREETING + "hereand there"
