"""The server: listens, greets, and tells every client what happens."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import trio

from kvmmig.errors import ConnectFailed
from kvmmig.qmp.address import Address, FdAddress, UnixAddress, parse_address
from kvmmig.qmp.admission import Admission, Refused
from kvmmig.qmp.connection import Connection
from kvmmig.qmp.endpoint import Listening, connect, listens, open_listener, secret_of
from kvmmig.qmp.messages import encode_error, encode_event, encode_greeting
from kvmmig.qmp.session import Session
from kvmmig.qmp.session_commands import add_session_commands
from kvmmig.qmp.table import CommandTable
from kvmmig.transport.peers import Peer, peer_of
from kvmmig.transport.toolkit import tcpsockets

_log = logging.getLogger(__name__)

_MOST_FDS = 256  # of all clients together: a process may usually have 1024
_STALL_LIMIT = 30.0  # seconds
_TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_GONE = (errno.ECONNABORTED, errno.EPERM, errno.EPROTO)  # of one client only
_ACCEPTED = 5.0  # seconds until who listens must have taken our connection
_AGAIN = 0.01  # seconds
_PAUSE = 0.1  # seconds until there may be a descriptor again


class QMPServer:
    """Serves one table of commands to any number of clients, each in a session of its own.

    ``version`` is the program's name and version, for the greeting. ``notices`` is told in a sentence what
    whoever started the server should know. A client that has taken nothing for ``stall_limit`` seconds while
    something waited is dropped.

    >>> server = QMPServer(table, version="kvmmig 0.1.0")
    >>> address = await nursery.start(server.serve, "unix:/run/user/1000/kvmmig/a.sock")
    >>> server.emit("STOP")
    """

    def __init__(
        self,
        table: CommandTable,
        *,
        version: str,
        notices: Callable[[str], None] | None = None,
        stall_limit: float = _STALL_LIMIT,
    ) -> None:
        self._table = table
        self._greeting = encode_greeting(version)
        self._notices = notices
        self._stall_limit = stall_limit
        self._connections: set[Connection] = set()
        self._admission = Admission()
        add_session_commands(table)

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._connections)

    def emit(self, event: str, data: Mapping[str, object] | None = None) -> None:
        """Send an event, with the present time, to every client that has negotiated. Never blocks.

        A client that does not read loses events once 1 MiB of them waits for it.
        """
        listening = [connection for connection in self._connections if connection.session.negotiated]
        if listening:
            line = encode_event(event, data)
            for connection in listening:
                connection.send_event(line)

    async def serve(
        self, address: str | Address, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve an address until cancelled; ``task_status.started`` gets it as text, with the real port.

        One that connects, or that is a connected socket, has one client, and this returns when it has gone.
        One that ``waits`` has started when its first client is there. Several may run at once, and share
        their clients' quotas. Raises `BadURI` and `ConnectFailed` before it has started. A cancel ends every
        session of this address: what has been answered is still sent as far as it goes without waiting.
        """
        parsed = parse_address(address) if isinstance(address, str) else address
        if not isinstance(parsed, FdAddress) and parsed.connects:
            secret = await secret_of(parsed)
            await self._serve_one(Listening(await connect(parsed), parsed, secret), task_status)
            return
        async with open_listener(parsed) as listening:
            if not listens(listening.socket):
                await self._serve_one(listening, task_status)
                return
            text = str(listening.address)
            if self._notices is not None and not isinstance(parsed, UnixAddress) and parsed.asks_nobody:
                self._notices(
                    f"the monitor listens on {text}: anyone who reaches that port controls the machine, "
                    "and may run programs with your rights"
                )
            async with trio.open_nursery() as nursery:
                if parsed.waits:
                    if self._notices is not None:
                        self._notices(f"the machine waits for a client on {text}, as wait=on says")
                    nursery.start_soon(self._greet, await self._accept(listening.socket), listening)
                task_status.started(text)
                while True:
                    nursery.start_soon(self._greet, await self._accept(listening.socket), listening)

    async def _serve_one(self, connected: Listening, task_status: trio.TaskStatus[str]) -> None:
        """The client at the other end of a socket that is connected already."""
        where = connected.address
        try:
            peer = await _peer_that_has_accepted(connected.socket)
            self._admission.check(peer, where)
        except OSError as error:
            connected.socket.close()
            raise ConnectFailed(f"no monitor is served at {where}: the other end has gone") from error
        except Refused as error:
            connected.socket.close()
            raise ConnectFailed(
                f"no monitor is served at {where}: it is for this user and root, and there is {peer}; add "
                ",secret-file=PATH for one who knows the secret, or ,insecure=on to let everybody in"
            ) from error
        except BaseException:  # a cancel
            connected.socket.close()
            raise
        task_status.started(str(connected.address))
        await self._greet(connected.socket, connected)

    async def _accept(self, listener: trio.socket.SocketType) -> trio.socket.SocketType:
        while True:
            try:
                return (await listener.accept())[0]
            except OSError as error:
                if error.errno in _TOO_MANY:
                    _log.warning("a client of the monitor waits: %s", error.strerror)
                    await trio.sleep(_PAUSE)
                elif error.errno not in _GONE:
                    raise

    async def _greet(self, sock: trio.socket.SocketType, listening: Listening) -> None:
        """Serve one client; whatever goes wrong with it is its own affair."""
        try:
            peer = peer_of(sock)
            with self._admission.admit(peer, listening.address):
                if sock.family != socket.AF_UNIX:
                    tcpsockets.tune(sock)
                connection = Connection(
                    sock,
                    Session(str(peer), self._room_for_fds),
                    self._table,
                    greeting=self._greeting,
                    stall_limit=self._stall_limit,
                    secret=listening.secret,
                    on_stranger=partial(self._admission.warn, peer),
                )
                self._connections.add(connection)
                try:
                    await connection.run()
                finally:
                    self._connections.discard(connection)
        except Refused as refusal:
            with sock, suppress(OSError):
                await sock.send(encode_error(str(refusal)))
        except OSError:
            sock.close()
        except Exception:
            _log.exception("a connection to the monitor failed in a way that nobody has foreseen")
            sock.close()

    def _room_for_fds(self) -> int:
        return _MOST_FDS - sum(connection.session.held for connection in self._connections)


async def _peer_that_has_accepted(sock: trio.socket.SocketType) -> Peer:
    """Who is at the other end. Of a TCP socket on this host the kernel knows it only when it was accepted."""
    peer = peer_of(sock)
    with trio.move_on_after(_ACCEPTED):
        while peer.local and peer.user is None:
            await trio.sleep(_AGAIN)
            peer = peer_of(sock)
    return peer
