"""``fd:NUMBER`` or ``fd:NAME``: a descriptor that this process was started with, or was given.

Which ones may be named is the affair of `kvmmig.transport.descriptors`.

A socket goes both ways, a pipe one. The descriptor is taken over: it is closed at the end, and meanwhile its
number is free for others, except that 0, 1 and 2 lead to /dev/null. It is made non-blocking, which whoever
shares it notices, and gets its former mode back at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import (
    Channel,
    Listener,
    PassingChannel,
    ReceiveChannel,
    SendChannel,
    Transport,
    TransportURI,
    descriptors,
)
from kvmmig.transport.toolkit import PipeReceiver, PipeSender, SocketChannel, TcpChannel, kind, why

_STANDARD = 3  # below it are those that every process expects to be open
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


def register(name: str, fd: int) -> None:
    """Let ``fd:NAME`` mean this descriptor, once. Whoever uses that URI takes it over.

    Raises `ValueError` for a name that could be a number, that is empty, or that waits to be used already.
    """
    try:
        given = descriptors.give(name, fd)
    except BadURI as error:
        raise ValueError(f"{name!r} is no name for a descriptor; begin it with a letter") from error
    if given != name:
        descriptors.forget(given)
        raise ValueError(f"{name!r} is the name of another descriptor that has not been used yet")


class FdTransport(Transport):
    """Writes to, or reads from, one open descriptor."""

    summary = "an open descriptor that this process was started with: a socket or a pipe"
    syntax = "fd:NUMBER or fd:NAME"
    arrives_at_once = True

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target:
            raise BadURI(f"{str(uri)!r} names no descriptor: write fd:NUMBER, such as fd:0")
        descriptors.number_of(uri.target)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        await trio.lowlevel.checkpoint()
        fd, mode, give_back = self._take(writing=True)
        make = PipeSender if stat.S_ISFIFO(mode) else _socket_channel
        async with make(fd, str(self.uri), give_back) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await trio.lowlevel.checkpoint()
        yield _FdListener(self)

    async def receiver(self) -> ReceiveChannel:
        """Take the descriptor over and read from it. Raises `ConnectFailed`."""
        await trio.lowlevel.checkpoint()
        fd, mode, give_back = self._take(writing=False)
        make = PipeReceiver if stat.S_ISFIFO(mode) else _socket_channel
        return make(fd, str(self.uri), give_back)

    def _take(self, *, writing: bool) -> tuple[int, int, Callable[[], None]]:
        """Take the descriptor over: a non-blocking one, its mode, and what gives back how it was.

        Raises `ConnectFailed` for one that can't serve.
        """
        number = descriptors.find(self.uri.target)
        mode = os.fstat(number).st_mode
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        self._check(number, mode, flags & os.O_ACCMODE, writing)
        try:
            fd, keeper = (fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _STANDARD) for _ in range(2))
            descriptors.forget(self.uri.target)
            descriptors.let_go(number)
            os.set_blocking(fd, False)
        except OSError as error:
            raise ConnectFailed(f"{self.uri} can't be taken over: {why(error)}") from error

        def give_back() -> None:
            """Its mode, for whoever else has it open."""
            with contextlib.suppress(OSError):
                os.set_blocking(keeper, not flags & os.O_NONBLOCK)
            os.close(keeper)

        return fd, mode, give_back

    def _check(self, number: int, mode: int, access: int, writing: bool) -> None:
        """Raise `ConnectFailed` unless it is a connected stream socket, or a pipe in the right direction."""
        if stat.S_ISFIFO(mode):
            if access not in (os.O_RDWR, os.O_WRONLY if writing else os.O_RDONLY):
                has, wants = ("reading", "writing") if writing else ("writing", "reading")
                raise ConnectFailed(f"{self.uri} is a pipe's end for {has}; give the one for {wants}")
        elif stat.S_ISSOCK(mode):
            _check_socket(number, str(self.uri))
        else:
            right = "use file:PATH" if stat.S_ISREG(mode) else "give a socket or a pipe"
            raise ConnectFailed(f"{self.uri} is {kind(mode)}; {right}")


class _FdListener(Listener):
    """The descriptor itself is the one connection that can be accepted."""

    def __init__(self, transport: FdTransport) -> None:
        self.uri = transport.uri
        self._transport = transport
        self._taken = False

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        if self._taken:
            raise ConnectFailed(f"{self.uri} has been accepted already; it is one connection")
        async with await self._transport.receiver() as channel:
            self._taken = True
            yield channel


class _TakenSocket(PassingChannel):
    """Calls ``give_back`` at the end."""

    def __init__(self, below: Channel, give_back: Callable[[], None]) -> None:
        super().__init__(below)
        self.proved = True  # whoever has given the descriptor knows whose its other end is
        self._at_end: list[Callable[[], None]] = [give_back]

    def abort(self) -> None:
        super().abort()
        self._give_back()

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            self._give_back()

    def _give_back(self) -> None:
        while self._at_end:
            self._at_end.pop()()


def _socket_channel(fd: int, name: str, give_back: Callable[[], None]) -> Channel:
    sock = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
    try:
        channel = SocketChannel(sock, name) if sock.family == socket.AF_UNIX else TcpChannel(sock)
    except OSError as error:  # it has ended meanwhile
        sock.close()
        give_back()
        raise ConnectFailed(f"{name} can't be taken over: {why(error)}") from error
    return _TakenSocket(channel, give_back)


def _check_socket(number: int, name: str) -> None:
    with socket.socket(fileno=os.dup(number)) as sock:
        wrong = ""
        if sock.type != socket.SOCK_STREAM or sock.family not in _FAMILIES:
            wrong = "a socket of another kind"
        elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            wrong = "a socket that listens"
        else:
            try:
                sock.getpeername()
            except OSError:
                wrong = "a socket that is not connected"
        if wrong:
            raise ConnectFailed(f"{name} is {wrong}; give a connected TCP or Unix socket")
