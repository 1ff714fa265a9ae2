"""``tap+TRANSPORT:...?tap.path=PATH``: what passes is kept too, for ``kvmmig stream dump PATH``.

What goes to the destination is written to PATH, what comes back from it to PATH.back, by a thread. Guest
memory may change while it is sent, so a copy is sent, and the same copy is written. A disk that is slower
than the way holds it up; one that fails ends the tap, and not the migration: a counter has what it lacks.
"""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import AnyChannel, Option, PassingChannel, Side, Transport, TransportURI, Wrapper
from kvmmig.transport.toolkit import Workers, open_in_thread, prefix

_MOST_BYTES = 1 << 20  # of one call
_MOST_WAITING = 16 << 20  # bytes that wait for the disk


class TapWrapper(Wrapper):
    """Writes down what passes."""

    summary = "keeps what passes in a file, guest memory included"
    syntax = "tap+TRANSPORT:...?tap.path=PATH"
    options = (Option("path", "where to, from / on; what comes back goes to the same with .back behind it"),)

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        self._path = self.option("path")
        if not self._path.startswith("/") or "\0" in self._path:
            raise BadURI(f"{str(uri)!r}: say where to, from / on, by tap.path=/PATH")

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        paths = [self._path, f"{self._path}.back"] if channel.two_way else [self._path]
        try:
            files = await open_in_thread(partial(_open, paths), _close)
        except OSError as error:
            raise ConnectFailed(f"nothing can be kept in {self._path}: {error.strerror}") from error
        forwards = _Tap(files[0])
        backwards = _Tap(files[1]) if channel.two_way else forwards
        try:
            yield _Tapped(channel, *((forwards, backwards) if side is Side.SOURCE else (backwards, forwards)))
        finally:
            for tap in {forwards, backwards}:
                tap.end()


class _Tap:
    """One direction's file, and the thread that writes it."""

    def __init__(self, fd: int) -> None:
        """Takes ``fd`` over."""
        self.written = self.lost = self._waiting = 0
        self._fd = fd
        self._changed = trio.lowlevel.ParkingLot()
        self._workers = Workers("kvmmig tap", 1, partial(os.close, fd))

    async def room(self) -> None:
        """Wait until more may be kept."""
        while self._waiting >= _MOST_WAITING:
            await self._changed.park()

    def keep(self, data: bytes) -> None:
        """Have it written."""
        self._waiting += len(data)
        self._workers.submit(partial(_write, self._fd, data), partial(self._note, len(data)))

    async def kept(self) -> None:
        """Wait until all of it is written, or lost."""
        while self._waiting:
            await self._changed.park()

    def end(self) -> None:
        """What waits is written still; nobody waits for that."""
        self._workers.submit(self._workers.stop, lambda error: None)

    def _note(self, count: int, error: Exception | None) -> None:
        self._waiting -= count
        if error is None:
            self.written += count
        else:
            self.lost += count
        self._changed.unpark_all()


class _Tapped(PassingChannel):
    """Sends copies, and keeps what was accepted of them, and what was received."""

    def __init__(self, below: AnyChannel, sent: _Tap, received: _Tap) -> None:
        super().__init__(below)
        self.copies = True
        self.call_size = _MOST_BYTES
        self._sent = sent
        self._received = received

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await self._sent.room()
        data = b"".join(prefix(buffers, _MOST_BYTES))
        count = await self.below.send_some([memoryview(data)])
        self._sent.keep(data if count == len(data) else data[:count])
        return count

    async def receive_some(self, buffer: memoryview) -> int:
        await self._received.room()
        count = await self.below.receive_some(buffer)
        self._received.keep(bytes(buffer[:count]))
        return count

    async def aclose(self) -> None:
        await self._sent.kept()
        await self._received.kept()
        await self.below.aclose()

    def counters(self) -> dict[str, float]:
        taps = {self._sent, self._received}
        return {
            **super().counters(),
            "tap.written-bytes": sum(tap.written for tap in taps),
            "tap.lost-bytes": sum(tap.lost for tap in taps),
        }


def _open(paths: Sequence[str]) -> list[int]:
    files: list[int] = []
    try:
        for path in paths:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            files.append(os.open(path, flags, 0o600))
            if not stat.S_ISREG(os.fstat(files[-1]).st_mode):
                raise OSError(0, "it is no regular file")
            os.ftruncate(files[-1], 0)
    except BaseException:
        _close(files)
        raise
    return files


def _close(files: Sequence[int]) -> None:
    for fd in files:
        os.close(fd)


def _write(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
