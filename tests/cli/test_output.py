from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Iterator

import pytest
import trio

from kvmmig.cli.output import SERIAL_BUFFER, Output
from kvmmig.errors import MachineError
from kvmmig.units import format_size


class Pipe:
    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()

    def read(self) -> str:
        os.set_blocking(self.read_end, False)
        try:
            return os.read(self.read_end, 1 << 20).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    made = Pipe(), Pipe()
    yield made
    for pipe in made:
        os.close(pipe.read_end)
        os.close(pipe.write_end)


@pytest.fixture
def screen() -> Iterator[tuple[int, int]]:
    """A terminal of ten columns: its two ends."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 10, 0, 0))
    yield master, slave
    os.close(slave)
    os.close(master)


async def test_serial_output_and_messages_go_each_to_their_own_place(pipes: tuple[Pipe, Pipe]) -> None:
    serial, messages = pipes
    async with Output(serial=serial.write_end, messages=messages.write_end) as output:
        output.serial(b"AB")
        output.say("hello")
        output.serial(b"C")
        output.status("never seen, for this is no terminal")
    assert serial.read() == "ABC"
    assert messages.read() == "hello\n"


async def test_in_one_place_they_keep_their_order_and_a_message_its_own_line(
    pipes: tuple[Pipe, Pipe],
) -> None:
    both = pipes[0].write_end
    async with Output(serial=both, messages=both) as output:
        output.serial(b"AB")
        output.say("hello")
        output.serial(b"C")
    assert pipes[0].read() == "AB\nhello\nC"


async def test_what_nobody_reads_is_bounded_and_said(pipes: tuple[Pipe, Pipe]) -> None:
    serial, messages = pipes
    kept = 0

    async def read_on() -> None:
        nonlocal kept
        while True:
            kept += len(serial.read())
            await trio.sleep(0.001)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            async with Output(serial=serial.write_end, messages=messages.write_end) as output:
                for _ in range(4 * SERIAL_BUFFER // 4096):
                    output.serial(bytes(4096))  # as from a vCPU: it never waits
                nursery.start_soon(read_on)
            nursery.cancel_scope.cancel()
    kept += len(serial.read())
    # What the pipe itself and the write that hangs hold is no longer counted.
    assert SERIAL_BUFFER <= kept <= 3 * SERIAL_BUFFER
    assert messages.read() == (
        f"kvmmig: {format_size(4 * SERIAL_BUFFER - kept)} of the guest's serial output were lost, because "
        "standard output did not take them\n"
    )


async def test_a_cancel_does_not_wait_for_a_reader(pipes: tuple[Pipe, Pipe]) -> None:
    serial, messages = pipes
    with trio.fail_after(60), trio.CancelScope() as scope:
        async with Output(serial=serial.write_end, messages=messages.write_end) as output:
            output.serial(bytes(SERIAL_BUFFER))  # more than the pipe holds
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_a_place_that_can_not_be_written_is_told_once() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        with trio.fail_after(60):
            async with Output(serial=write_end, serial_name="the log", messages=write_end) as output:
                output.say("not even this can be said")
                output.serial(b"A")
                with pytest.raises(MachineError, match=r"can't be written to the log: Broken pipe$"):
                    await output.watch()
                output.serial(b"B")  # goes nowhere
    finally:
        os.close(write_end)


async def test_the_status_stands_below_and_goes_away(screen: tuple[int, int]) -> None:
    master, slave = screen
    async with Output(serial=slave, messages=slave) as output:
        output.serial(b"ABC")
        await output.drain()
        output.status("sent 1, left 2")
        await output.drain()
        output.serial(b"D")
        await output.drain()
        output.status("")
        output.say("done")
    shown = ""
    while not shown.endswith("done\r\n"):  # a terminal hands on what it got in its own time
        shown += os.read(master, 1000).decode()
    draw, erase = "\x1bD\x1b[A\x1b7\x1bE\x1b[2Ksent 1, l\x1b8", "\x1b7\x1bE\x1b[2K\x1b8"
    assert shown.split(erase) == [f"ABC{draw}", f"D{draw}", "\r\ndone\r\n"]


async def test_in_the_last_column_the_cursor_wraps_before_the_status_is_drawn(
    screen: tuple[int, int],
) -> None:
    master, slave = screen
    async with Output(serial=slave, messages=slave) as output:
        output.serial(b"0123456789")
        await output.drain()
        output.status("x")
        await output.drain()
    shown = ""
    while not shown.endswith("\x1b8"):
        shown += os.read(master, 1000).decode()
    assert shown.startswith("0123456789 \r\x1bD")
