"""The serial port as a Unix socket: who connects gets what was written last, then what comes, and may type.

Who shuts down its own direction types no more, gets what has been written so far, and is left.

The guest never waits for a watcher. What it writes goes into a ring of the last 64 KiB, and each watcher has
only a position in it: a slow one finds that the ring has gone on, and loses what was between.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from kvmmig.transport.toolkit import unixsockets

#: Bytes of serial output that are kept for those who come later.
BACKLOG = 64 << 10
_READ = 4096
_BACKLOG = 16
_SOON = 0.005
_LAST_CHANCE = 0.2  # seconds in which watchers may take the last words


class Ring:
    """The newest bytes of a stream, by their position in it. Thread-safe, and nobody ever waits."""

    def __init__(self, size: int = BACKLOG) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._data = bytearray()
        self._end = 0
        self._somebody_waits = False

    def write(self, data: bytes) -> bool:
        """Append; True when a reader had found nothing new since the last write, and wants to be woken."""
        with self._lock:
            self._data += data[-self._size :]
            del self._data[: -self._size]
            self._end += len(data)
            wake, self._somebody_waits = self._somebody_waits, False
            return wake

    def read(self, position: int) -> tuple[bytes, int]:
        """What came after ``position``, as far as it is still there, and the position behind it."""
        with self._lock:
            new = min(self._end - position, len(self._data))
            if not new:
                self._somebody_waits = True
            return bytes(self._data[len(self._data) - new :]), self._end


class ConsoleServer:
    """Serves one serial port to any number of watchers; `write` is for the guest's side."""

    def __init__(self, feed: Callable[[bytes], Awaitable[None]]) -> None:
        """``feed`` types at the guest; it may wait, as long as the guest takes nothing."""
        self._ring = Ring()
        self._feed = feed
        self._token = trio.lowlevel.current_trio_token()
        self._news = trio.Event()
        self._closing = False

    def write(self, data: bytes) -> None:
        """What the guest has written. Called in vCPU threads; never blocks."""
        if self._ring.write(data):
            with suppress(trio.RunFinishedError):  # vCPUs may outlive the loop by a moment
                self._token.run_sync_soon(self._wake, idempotent=True)

    @property
    def last_words(self) -> bytes:
        """What the guest has written last."""
        return self._ring.read(0)[0]

    @asynccontextmanager
    async def serving(self, path: str | os.PathLike[str]) -> AsyncIterator[None]:
        """Listen on a new socket, for this user alone. Raises `OSError`.

        At the end watchers get the last words, as far as they take them at once, and the socket is removed.
        """
        listener, file = _listen(os.fspath(path))
        try:
            async with trio.open_nursery() as nursery:
                watchers = await nursery.start(self._hold_watchers)
                nursery.start_soon(
                    partial(trio.serve_listeners, self._watched, [listener], handler_nursery=watchers)
                )
                try:
                    yield
                finally:
                    self._closing = True
                    self._wake()
                    with trio.move_on_after(_LAST_CHANCE, shield=True):
                        while watchers.child_tasks:  # noqa: ASYNC110 - a nursery has no event for it
                            await trio.sleep(_SOON)
                    nursery.cancel_scope.cancel()
        finally:
            file.remove()

    async def _hold_watchers(self, *, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        async with trio.open_nursery() as nursery:
            task_status.started(nursery)
            await trio.sleep_forever()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _watched(self, stream: trio.SocketStream) -> None:
        until: list[int] = []  # the position at which one who types no more is left
        try:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._show, stream, nursery.cancel_scope, until)
                await self._type(stream)
                until.append(self._ring.read(0)[1])
                self._wake()
        except* trio.BrokenResourceError:
            pass  # it is gone, and that is its own affair

    async def _show(self, stream: trio.SocketStream, scope: trio.CancelScope, until: list[int]) -> None:
        position = 0
        while not until or position < until[0]:
            news, closing = self._news, self._closing
            data, position = self._ring.read(position)
            if data:
                await stream.send_all(data)
            elif closing:
                break
            else:
                await news.wait()
        scope.cancel()

    async def _type(self, stream: trio.SocketStream) -> None:
        while data := await stream.receive_some(_READ):
            await self._feed(data)


def _listen(path: str) -> tuple[trio.SocketListener, unixsockets.SocketFile]:
    try:
        sock, file = unixsockets.listen(path, _BACKLOG)
    except unixsockets.PathTaken as taken:
        raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path) from taken
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock)), file
