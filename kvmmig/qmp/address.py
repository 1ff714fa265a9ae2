"""Where a monitor listens: ``unix:PATH`` or ``tcp:HOST:PORT[,OPTION=VALUE]``, as QEMU's ``-qmp`` writes it.

A Unix socket's file is private to its user from the moment it exists, and takes the place only of one that
a dead monitor has left behind. TCP has no such guard. On a loopback address, which is the default, the kernel
says whose the other end is; elsewhere clients prove that they know a secret, or somebody has said aloud that
nobody is asked.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.qmp.secret import read_secret
from kvmmig.transport.peers import is_loopback
from kvmmig.transport.toolkit import TCP_WORDS, tcpsockets, unixsockets, why
from kvmmig.units import PORT

_LONGEST_PATH = 107  # bytes: sun_path of <sys/un.h> without its final zero
_LOOPBACK = "127.0.0.1"
_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_HOW = "write unix:PATH, such as unix:/tmp/a.sock, or tcp:HOST:PORT, such as tcp:127.0.0.1:4444"
_OPTION = re.compile(r",(?P<name>[^=,]*)=(?P<value>(?:[^,]|,,)*)")  # QEMU's: a comma in a value is doubled
_OPTIONS = "there are secret-file=PATH, and insecure=on, which lets everybody in"
_AGAIN = 0.01  # seconds between two attempts to connect where others wait already
_BACKLOG = 64

_WORDS: Mapping[int, str] = {
    **TCP_WORDS,
    errno.ECONNREFUSED: "nobody listens there",
    errno.ENOTDIR: "a part of that path is no directory",
    errno.ENOTSOCK: "it is no socket",
    errno.EPROTOTYPE: "it is no stream socket",
    errno.EACCES: "you have no permission",
    errno.EADDRINUSE: "another process listens there already",
}


@dataclass(frozen=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A host, by name or number, and a port; port 0 listens on any free one.

    ``secret_file`` has what both sides prove that they know. Without it a monitor serves only this user's and
    root's processes of this host, unless it ``asks_nobody``.
    """

    host: str
    port: int
    secret_file: str = ""
    asks_nobody: bool = False

    def __str__(self) -> str:
        where = f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        if self.secret_file:
            where += f",secret-file={self.secret_file.replace(',', ',,')}"
        return f"{where},insecure=on" if self.asks_nobody else where


Address = UnixAddress | TcpAddress


@dataclass(frozen=True)
class Listening:
    """A socket that listens, and the secret of its clients, or None where there is none."""

    socket: trio.socket.SocketType
    address: Address
    secret: bytes | None = None


def parse_address(text: str) -> Address:
    """Raises `BadURI`."""
    kind, colon, rest = text.partition(":")
    if kind == "unix" and colon:
        if not rest or "\0" in rest:
            raise BadURI(f"{text!r} names no socket: {_HOW}")
        if (length := len(os.fsencode(rest))) > _LONGEST_PATH:
            raise BadURI(
                f"{text!r}: the path has {length} bytes, and a socket's may have {_LONGEST_PATH}; "
                "choose a shorter one"
            )
        return UnixAddress(rest)
    where, comma, options = rest.partition(",")
    match = _TCP.fullmatch(where)
    if kind != "tcp" or match is None or int(match["port"]) not in PORT:
        raise BadURI(f"{text!r} is not a monitor's address: {_HOW}")
    given = _parse_options(text, comma + options)
    return TcpAddress(
        match["v6"] or match["host"] or _LOOPBACK,
        int(match["port"]),
        secret_file=given.get("secret-file", ""),
        asks_nobody=given.get("insecure") == "on",
    )


def _parse_options(text: str, options: str) -> dict[str, str]:
    given: dict[str, str] = {}
    at = 0
    while at < len(options):
        match = _OPTION.match(options, at)
        if match is None:
            raise BadURI(f"{text!r}: after the port come options, as in ,secret-file=PATH; {_OPTIONS}")
        name, value = match["name"], match["value"].replace(",,", ",")
        if name not in ("secret-file", "insecure"):
            raise BadURI(f"{text!r}: a monitor's address has no option {name!r}; {_OPTIONS}")
        if name in given:
            raise BadURI(f"{text!r} gives {name!r} twice; give it once")
        if (name == "insecure" and value not in ("on", "off")) or not value or "\0" in value:
            raise BadURI(f"{text!r}: {name}={value} is not understood; {_OPTIONS}")
        given[name] = value
        at = match.end()
    if "secret-file" in given and given.get("insecure") == "on":
        raise BadURI(f"{text!r}: with a secret it is not insecure; leave one of them out")
    return given


@asynccontextmanager
async def open_listener(address: Address) -> AsyncIterator[Listening]:
    """Listen as long as the block lasts. Raises `ConnectFailed`; `BadURI` where anybody could come in.

    A socket file is removed at the end, unless another has taken its name meanwhile.
    """
    if isinstance(address, UnixAddress):
        # A thread, because looking up a path may wait for a disk.
        bound, file = await trio.to_thread.run_sync(_bind_unix, address)
        listening = Listening(trio.socket.from_stdlib_socket(bound), address)
    else:
        listening, file = await _listen_tcp(address), None
    try:
        yield listening
    finally:
        if file is not None:
            file.remove()
        listening.socket.close()


async def connect(address: Address) -> trio.socket.SocketType:
    """Connect, and wait where the listener's queue is full. Raises `ConnectFailed`."""
    if isinstance(address, UnixAddress):
        return await _connect_unix(address)
    addresses = await _resolve(address)
    try:
        sock = await tcpsockets.connect(addresses)
    except OSError as error:
        raise ConnectFailed(f"can't connect to {address}: {why(error, _WORDS)}") from error
    tcpsockets.tune(sock)
    return sock


async def _connect_unix(address: UnixAddress) -> trio.socket.SocketType:
    while True:
        await trio.lowlevel.checkpoint()
        sock = _try_to_connect(address)
        if sock is not None:
            return sock
        await trio.sleep(_AGAIN)


def _try_to_connect(address: UnixAddress) -> trio.socket.SocketType | None:
    try:
        sock = unixsockets.try_connect(address.path)
    except OSError as error:
        words = "there is no such socket" if error.errno == errno.ENOENT else why(error, _WORDS)
        raise ConnectFailed(f"can't connect to {address}: {words}") from error
    return trio.socket.from_stdlib_socket(sock) if sock is not None else None


def _bind_unix(address: UnixAddress) -> tuple[socket.socket, unixsockets.SocketFile]:
    try:
        sock, file = unixsockets.listen(address.path, _BACKLOG)
    except unixsockets.PathTaken as taken:
        what = "something that is no socket has that name" if taken.mode else "another process listens there"
        raise ConnectFailed(f"can't listen on {address}: {what} already; choose another path") from taken
    except OSError as error:
        raise ConnectFailed(f"can't listen on {address}: {why(error, _WORDS)}") from error
    sock.setblocking(False)
    return sock, file


async def _listen_tcp(address: TcpAddress) -> Listening:
    """On the first address that the host's name stands for."""
    secret = await trio.to_thread.run_sync(read_secret, address.secret_file) if address.secret_file else None
    addresses = await _resolve(address)
    if not (secret or address.asks_nobody or is_loopback(addresses[0][1][0])):
        raise BadURI(
            f"{address} can be reached from other hosts, and whoever is let in may do all that you may: "
            f"write tcp:{_LOOPBACK}:PORT for your own processes on this host, add ,secret-file=PATH for "
            "clients that know a secret, or ,insecure=on to let everybody in"
        )
    try:
        sock = await tcpsockets.listen(addresses, _BACKLOG)
    except OSError as error:
        raise ConnectFailed(f"can't listen on {address}: {why(error, _WORDS)}") from error
    host, port = sock.getsockname()[:2]
    return Listening(sock, replace(address, host=host, port=port), secret)


async def _resolve(address: TcpAddress) -> list[tcpsockets.SocketAddress]:
    try:
        return await tcpsockets.resolve(address.host, address.port)
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(
            f"{address}: the host name {address.host!r} can't be resolved: {why(error, _WORDS)}"
        ) from error
