"""``kvmmig logs``: a machine's messages, and what its guest has written, also when it has ended."""

from __future__ import annotations

import os
from contextlib import suppress

import trio

from kvmmig.cli import rundir
from kvmmig.cli.consoleserver import BACKLOG
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import echo
from kvmmig.cli.remote import connected, no_such_machine
from kvmmig.cli.statuses import command_line

_CHUNK = 65536
_EVERY = 0.2  # seconds between two looks at a log that is followed


def show_log(name: str, *, follow: bool) -> int:
    """Print it; with ``follow`` until the machine ends. Returns 0.

    Raises `NoSuchMachine` where neither a machine nor a log has that name.
    """
    with command_line():
        rundir.check_name(name)

    async def command() -> int:
        with _Messages(name) as messages:
            messages.show()
            if not await _show_written(name, messages, follow=follow) and not messages.there:
                raise no_such_machine(name)
        return 0

    return run_to_end(command)


class _Messages:
    """A machine's log, shown as far as it goes; where the machine runs in a terminal there is none."""

    def __init__(self, name: str) -> None:
        self._fd = rundir.open_log(name)

    @property
    def there(self) -> bool:
        return self._fd is not None

    def __enter__(self) -> _Messages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def show(self, *, but: bytes = b"") -> None:
        """What has come since the last time; it may end with what has been shown already."""
        if self._fd is None:
            return
        new = bytearray()
        while data := os.read(self._fd, _CHUNK):
            new += data
        echo(bytes(new).removesuffix(but).decode(errors="replace"), nl=False)

    async def go_on(self) -> None:
        while True:
            self.show()
            await trio.sleep(_EVERY)


async def _show_written(name: str, messages: _Messages, *, follow: bool) -> bool:
    """What the guest has written. False where no machine of that name runs: its log is all there is."""
    try:
        stream = trio.SocketStream(await connected(rundir.connect_console, name))
    except OSError:
        await _show_last(name, messages, follow=follow)
        return False
    kept = b""
    async with stream, trio.open_nursery() as nursery:
        if follow:
            nursery.start_soon(messages.go_on)
        else:
            await stream.send_eof()  # what is there is sent, and no more
        with suppress(trio.BrokenResourceError):  # it ended with this still in its queue
            while data := bytes(await stream.receive_some(_CHUNK)):
                kept = (kept + data)[-BACKLOG:]
                await trio.to_thread.run_sync(_write, data, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    if follow or not kept:
        await _show_last(name, messages, follow=follow, but=kept)
    return True


async def _show_last(name: str, messages: _Messages, *, follow: bool, but: bytes = b"") -> None:
    """A machine that ends closes its console, and then writes to its log what its guest has written last."""
    if follow:
        await trio.to_thread.run_sync(rundir.wait_for_end, name, abandon_on_cancel=True)
    messages.show(but=but)


def _write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(1, left) :]
