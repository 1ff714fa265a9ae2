"""Everything that a running command writes: the guest's serial output, messages, and one live status line.

One thread writes it all, because a terminal that is stopped (Ctrl-S), or a pipe that nobody reads, holds up
whoever writes to it, and that must be neither the event loop nor a vCPU. What it has not written yet is
bounded: a guest that goes on printing into such an output loses what doesn't fit.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from types import TracebackType
from typing import Self

import trio

from kvmmig.errors import MachineError, printable
from kvmmig.units import format_size

#: Bytes of serial output that may wait for a slow reader.
SERIAL_BUFFER = 1 << 20
_MESSAGES = 1000  # and messages
_LAST_CHANCE = 0.2  # seconds for what is left to be written, when the command was cancelled

# The status stands in the row below the cursor, which is where the guest left it. "Index" makes sure that
# there is such a row and, unlike a newline, keeps the column. (ECMA-48; DEC VT100: IND, NEL, DECSC, DECRC)
_DRAW = "\x1bD\x1b[A\x1b7\x1bE\x1b[2K{}\x1b8"
_ERASE = "\x1b7\x1bE\x1b[2K\x1b8"


class Output:
    """``async with Output(...) as output``: leaving the block waits until all has been written, or cancelled.

    ``serial`` is the file descriptor for the guest's output, ``serial_name`` what errors call it;
    ``messages`` is where the rest goes. Neither is closed here.
    """

    def __init__(self, *, serial: int = 1, serial_name: str = "standard output", messages: int = 2) -> None:
        self._serial = serial
        self._serial_name = serial_name
        self._messages = messages
        #: Messages go to a terminal, so a status line can be shown.
        self.live = os.isatty(messages)
        self._same_file = _are_the_same(serial, messages)
        self._changed = threading.Condition()
        self._queue: deque[tuple[bool, bytearray]] = deque()  # is it a message?
        self._serial_waiting = 0
        self._lost = 0
        self._status = ""
        self._closing = False
        self._idle = True
        # the thread's own
        self._shown = ""
        self._column = 0  # of the cursor, as far as plain text goes
        self._broken: set[int] = set()
        # the loop's own
        self._token: trio.lowlevel.TrioToken
        self._failed = trio.Event()
        self._failure: OSError | None = None

    def serial(self, data: bytes) -> None:
        """Write what the guest sent. Thread-safe; never blocks; drops what doesn't fit into the buffer."""
        with self._changed:
            room = SERIAL_BUFFER - self._serial_waiting
            if len(data) > room:
                self._lost += len(data) - room
                data = data[:room]
            self._serial_waiting += len(data)
            if self._queue and not self._queue[-1][0]:
                self._queue[-1][1].extend(data)
            else:
                self._queue.append((False, bytearray(data)))
            self._changed.notify_all()

    def say(self, text: str, *, drawn: bool = False) -> None:
        """Write a message of one or more lines, above the status line. Thread-safe, never blocks.

        What a terminal would obey is taken out of it, unless it was ``drawn`` with that.
        """
        text = text if drawn else printable(text, "\n\t")
        with self._changed:
            if len(self._queue) < _MESSAGES:
                self._queue.append((True, bytearray(text.encode(errors="replace") + b"\n")))
            self._changed.notify_all()

    def status(self, text: str) -> None:
        """Show this line below everything else, where that can be done; an empty one takes it away."""
        if self.live:
            with self._changed:
                self._status = printable(text)
                self._changed.notify_all()

    async def watch(self) -> None:
        """Raise `MachineError` when the guest's output can't be written any more; else wait for ever."""
        await self._failed.wait()
        assert self._failure is not None
        raise MachineError(
            f"the guest's serial output can't be written to {self._serial_name}: {self._failure.strerror}"
        ) from self._failure

    async def drain(self) -> None:
        """Wait until all that was given so far has been written. A cancel leaves it on its way."""
        await trio.to_thread.run_sync(self._wait_idle, abandon_on_cancel=True)

    def drain_briefly(self) -> None:
        """Wait, but not long, until all that was given so far has been written. For a thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._nothing_to_do(), _LAST_CHANCE)

    async def __aenter__(self) -> Self:
        self._token = trio.lowlevel.current_trio_token()
        # A daemon, for it may be held in a write for ever.
        threading.Thread(target=self._write_all, name="kvmmig output", daemon=True).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.status("")
        if self._lost:
            self.say(
                f"kvmmig: {format_size(self._lost)} of the guest's serial output were lost, because "
                f"{self._serial_name} did not take them"
            )
        try:
            await self.drain()
        finally:
            with trio.move_on_after(_LAST_CHANCE, shield=True):
                await self.drain()
            with self._changed:
                self._closing = True
                self._changed.notify_all()

    def _wait_idle(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._nothing_to_do())

    def _nothing_to_do(self) -> bool:
        return self._idle and not self._queue and self._status == self._shown

    # -- the thread -----------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing or not self._nothing_to_do())
                if self._closing:
                    return
                self._idle = False
                is_message, data = self._queue.popleft() if self._queue else (True, bytearray())
                if not is_message:
                    self._serial_waiting -= len(data)
                status = self._status
            self._write_one(is_message, bytes(data), status)

    def _write_one(self, is_message: bool, data: bytes, status: str) -> None:
        together = is_message or self._same_file
        if together and self._shown and (data or status != self._shown):
            self._write(self._messages, _ERASE.encode())
            self._shown = ""
        if data:
            if together:
                if is_message and self._column:
                    data = b"\n" + data
                last_line = data[max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 :]
                self._column = len(last_line) + (self._column if last_line == data else 0)
            self._write(self._messages if is_message else self._serial, data)
        if status != self._shown and self.live:
            self._draw(status)

    def _draw(self, status: str) -> None:
        columns = _columns(self._messages)
        if self._column and self._column % columns == 0:
            # In the last column a terminal puts off the wrap, and forgets that when its cursor is moved.
            self._write(self._messages, b" \r")
            self._column = 0
        line = _DRAW.format(status[: columns - 1]) if status else ""
        self._write(self._messages, line.encode(errors="replace"))
        self._shown = status

    def _write(self, fd: int, data: bytes) -> None:
        if fd in self._broken:
            return
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(fd, rest) :]
                except BlockingIOError:  # somebody who shares this terminal or pipe made it non-blocking
                    select.select([], [fd], [])
        except OSError as error:
            self._broken.add(fd)
            if fd == self._serial:
                self._failure = error
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._failed.set)


def _are_the_same(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:  # one of them is not open
        return False


def _columns(fd: int) -> int:
    try:
        return os.get_terminal_size(fd).columns or 80
    except OSError:  # it has just been hung up
        return 80
