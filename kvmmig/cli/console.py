"""``kvmmig console``: a terminal on a machine's serial port."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress

import trio

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.remote import connected, not_there
from kvmmig.cli.rundir import check_name, connect_console
from kvmmig.cli.statuses import command_line
from kvmmig.cli.terminal import Keyboard
from kvmmig.errors import ConnectFailed, printable

_LEAVE = b"\x1d"  # Ctrl-]
_CHUNK = 65536


def attach(name: str) -> int:
    """Show the serial port and type at it, until Ctrl-], or until the machine ends. Raises `KvmmigError`."""
    with command_line():
        check_name(name)

    async def command() -> int:
        stream = await _connect(name)
        async with stream:
            at_terminal = os.isatty(0)
            if at_terminal:
                _say(f"the serial port of {name!r}; Ctrl-] leaves it")
            keyboard = Keyboard(0, every_key=True)
            with keyboard.modes() if at_terminal else nullcontext():
                left = await _both_ways(stream, keyboard)
        if at_terminal:
            _say(f"{name!r} goes on without you" if left else f"{name!r} has closed its serial port")
        return 0

    return run_to_end(command)


async def _connect(name: str) -> trio.SocketStream:
    try:
        return trio.SocketStream(await connected(connect_console, name))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise not_there(name) from error
    except OSError as error:
        raise ConnectFailed(f"can't reach the serial port of {name!r}: {error.strerror}") from error


async def _both_ways(stream: trio.SocketStream, keyboard: Keyboard) -> bool:
    """True when the person has left; False when the machine has gone, or nobody reads what it writes."""
    left = False

    async def feed(data: bytes) -> None:
        nonlocal left
        head, leave, _ = data.partition(_LEAVE) if os.isatty(0) else (data, b"", b"")
        if head:
            await stream.send_all(head)
        if leave:
            left = True
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keyboard.obey_job_control)
        nursery.start_soon(_until_broken, lambda: keyboard.feed(feed))
        await _until_broken(lambda: _show(stream))
        nursery.cancel_scope.cancel()
    return left


async def _until_broken(call: Callable[[], Awaitable[None]]) -> None:
    with suppress(trio.BrokenResourceError):  # whoever reads finds the end of the stream
        await call()


async def _show(stream: trio.SocketStream) -> None:
    while data := await stream.receive_some(_CHUNK):
        rest = memoryview(bytes(data))
        while rest:
            # In a thread: a terminal that is stopped, or a pipe that nobody reads, must not hold up Ctrl-].
            try:
                rest = rest[await trio.to_thread.run_sync(os.write, 1, rest, abandon_on_cancel=True) :]
            except BrokenPipeError:
                return


def _say(text: str) -> None:
    text = printable(text)
    print(f"\r\nkvmmig: {text}\r" if sys.stderr.isatty() else f"kvmmig: {text}", file=sys.stderr, flush=True)
