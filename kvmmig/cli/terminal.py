"""From the keyboard to the guest: a terminal's modes, and who may touch them and when.

The guest gets every key as it is typed, and echoes what it likes; only the keys that send signals (Ctrl-C,
Ctrl-\\, Ctrl-Z) and that stop the output (Ctrl-S, Ctrl-Q) stay with the terminal.
"""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import trio

_CHUNK = 4096
_LOOK_AGAIN = 0.5  # seconds


@contextmanager
def one_key(fd: int) -> Iterator[None]:
    """In this block a terminal hands on each key at once, and does not show it; those for signals stay."""
    found = termios.tcgetattr(fd)
    modes = [*found[:6], list(found[6])]
    modes[3] &= ~(termios.ICANON | termios.ECHO)
    modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, modes)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, found)


class Keyboard:
    """Reads a file descriptor for the guest: a terminal, a pipe, a file. Nothing is closed here."""

    def __init__(self, fd: int, *, every_key: bool = False) -> None:
        """``every_key`` gives the guest those keys too that send signals and stop the output."""
        self._fd = fd
        self._every_key = every_key
        self._found: list[Any] | None = None  # the modes to be restored

    @contextmanager
    def modes(self) -> Iterator[None]:
        """A terminal is in the guest's mode inside the block, and restored behind it."""
        self._seize()
        try:
            yield
        finally:
            self.restore()

    async def feed(self, feed: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand on what is typed, until there is no more of it. A cancel may lose the last of it."""
        while True:
            while not self._ours():  # noqa: ASYNC110 - nothing tells when a shell's "fg" has run
                await trio.sleep(_LOOK_AGAIN)
            self._seize()
            try:
                # Files and /dev/null can't be waited for, and are always ready.
                with suppress(PermissionError):
                    await trio.lowlevel.wait_readable(self._fd)
                if not self._ours():
                    continue
                # In a thread: somebody else who reads here too may have been quicker.
                data = await trio.to_thread.run_sync(os.read, self._fd, _CHUNK, abandon_on_cancel=True)
            except OSError:  # hung up, or not open for reading
                return
            if not data:
                return
            await feed(data)

    async def obey_job_control(self) -> None:
        """Ctrl-Z gives the terminal back before the process stops; when it goes on it takes it again."""
        if not os.isatty(self._fd) or signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN:
            return
        with trio.open_signal_receiver(signal.SIGTSTP, signal.SIGCONT) as signals:
            async for number in signals:
                if number == signal.SIGTSTP:
                    self.restore()
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    self._seize()

    def _ours(self) -> bool:
        """False for the terminal that this runs on in the background: to read or change it would stop us."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # no terminal, or not the one that this runs on
            return True

    def _seize(self) -> None:
        if self._found is not None or not os.isatty(self._fd) or not self._ours():
            return
        with suppress(termios.error):
            modes = termios.tcgetattr(self._fd)
            self._found = [*modes[:6], list(modes[6])]
            modes[0] &= ~termios.ICRNL  # the Return key sends what it does on a serial terminal
            modes[3] &= ~(termios.ICANON | termios.ECHO)
            if self._every_key:
                modes[0] &= ~(termios.IXON | termios.IXOFF)
                modes[3] &= ~(termios.ISIG | termios.IEXTEN)
            modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._fd, termios.TCSANOW, modes)

    def restore(self) -> None:
        """Give a terminal its own modes back. Idempotent; any thread may do it."""
        found, self._found = self._found, None
        # In the background the shell has its own modes there, and will see to ours.
        if found is not None and self._ours():
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, found)
