"""A small QMP client, for scripts and for the command line. It speaks to QEMU's monitors too."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.qmp.address import Address, parse_address
from kvmmig.qmp.endpoint import connect, secret_of
from kvmmig.qmp.messages import QMPError
from kvmmig.qmp.secret import CHALLENGE, PROVE, Proofs, new_nonce

_CONNECT_TIMEOUT = 5.0  # seconds
_READ = 64 << 10  # bytes
_LONGEST_LINE = 16 << 20  # bytes
_MOST_EVENTS = 1000


@dataclass(frozen=True)
class Event:
    """Something that happened: its name and data as in QMP.

    ``timestamp`` is in seconds since the epoch, by the monitor's clock.
    """

    name: str
    data: Mapping[str, Any]
    timestamp: float


class QMPClient:
    """One connection to a monitor, which has negotiated.

    >>> async with kvmmig.open_machine("dirtier", memory="8MiB", settings={"hot": "1MiB"}) as machine:
    ...     async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor:
    ...         await machine.start()
    ...         async with kvmmig.QMPClient.connect(monitor.addresses[0]) as client:
    ...             events = [{"capability": "events", "state": True}]
    ...             await client.execute("migrate-set-capabilities", {"capabilities": events})
    ...             await client.execute("migrate", {"uri": "exec:cat > /dev/null"})
    ...             async for event in client.events():
    ...                 if event.name == "MIGRATION":
    ...                     print(event.data["status"])
    ...                     if event.data["status"] in ("completed", "failed", "cancelled"):
    ...                         break
    setup
    active
    device
    completed

    Any number of tasks may use it at once. No task runs in the background: whoever waits for a reply or for
    an event reads for all of them. So who wants events must wait for something, or they pile up on the
    monitor's side.
    """

    def __init__(self, sock: trio.socket.SocketType, address: Address) -> None:
        """Use `connect`."""
        self._socket = sock
        self._address = address
        #: What the monitor said of itself: ``{"version": {"qemu": {...}, "package": ...}, "capabilities":
        #: [...]}``.
        self.greeting: Mapping[str, Any] = {}
        #: How many events were lost because nobody took them.
        self.dropped_events = 0
        self._challenge: str | None = None
        self._last_id = 0
        self._replies: dict[int, _Message | None] = {}  # by id; None has not come yet
        self._events: deque[Event] = deque()
        self._outgoing: deque[_Outgoing] = deque()
        self._sending = trio.Lock()
        self._reading = trio.Lock()
        self._input = bytearray()
        self._scanned = 0  # of _input
        self._failure: ChannelBroken | ChannelClosed | None = None

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        address: str | Address,
        *,
        timeout: float = _CONNECT_TIMEOUT,
        sock: trio.socket.SocketType | None = None,
    ) -> AsyncIterator[QMPClient]:
        """Connect and negotiate; closed at the end of the block.

        ``address`` is ``unix:PATH`` or ``tcp:HOST:PORT[,secret-file=PATH]``, ``timeout`` in seconds; ``sock``
        is connected there already, and is taken over. Where a secret is given, the monitor must know it too.
        Raises `BadURI` and
        `ConnectFailed`, the latter also where somebody listens who does not speak QMP, or does not answer.
        """
        parsed = parse_address(address) if isinstance(address, str) else address
        client: QMPClient | None = None
        try:
            with trio.move_on_after(timeout) as scope:
                secret = await secret_of(parsed)
                client = cls(sock or await connect(parsed), parsed)
                await client._negotiate(secret)
            if client is None or scope.cancelled_caught:
                raise ConnectFailed(f"the monitor at {parsed} has not answered for {timeout:g} s")
            yield client
        finally:
            if client is not None:
                client.close()

    def close(self) -> None:
        """Close the connection. Whoever waits for something gets a `ChannelClosed`."""
        if self._failure is None:
            self._failure = ChannelClosed(
                f"the connection to the monitor at {self._address} was closed by this side"
            )
        while self._outgoing:
            self._outgoing.popleft().close_fds()
        self._socket.close()

    async def execute(
        self, command: str, /, arguments: Mapping[str, object] | None = None, *, fds: Sequence[int] = ()
    ) -> Any:
        """Have a command carried out, and return its reply.

        ``fds`` are passed with it, for ``getfd``; they stay the caller's. Raises `QMPError` when the
        monitor says no, `ChannelBroken` when it is gone. A cancel leaves the client usable; whether the
        command was carried out is not known then.
        """
        outgoing = self._encode(command, arguments, fds)
        waiting = outgoing.request_id
        self._replies[waiting] = None
        try:
            self._outgoing.append(outgoing)
            await self._flush()
            while (reply := self._replies[waiting]) is None:
                await self._read_for_all(lambda: self._replies[waiting] is not None)
        finally:
            del self._replies[waiting]
            if outgoing in self._outgoing and not outgoing.begun:
                self._outgoing.remove(outgoing)
                outgoing.close_fds()
        if reply.error is not None:
            raise QMPError(reply.error.desc, error_class=reply.error.class_)
        return reply.result

    def events(self) -> AsyncIterator[Event]:
        """Events in their order, beginning with the oldest that nobody has taken since the client has
        connected.

        Ends when the client is closed; raises `ChannelBroken` when the monitor is gone. A thousand are
        kept; then the oldest are dropped, and counted in `dropped_events`.
        """
        return _Events(self)

    async def next_event(self) -> Event:
        """What `events` yields next. Raises `ChannelBroken` and `ChannelClosed`."""
        while not self._events:
            await self._read_for_all(lambda: bool(self._events))
        return self._events.popleft()

    async def _negotiate(self, secret: bytes | None) -> None:
        try:
            if secret is not None:
                await self._prove(secret)
            while not self.greeting:
                await self._read_for_all(lambda: bool(self.greeting) or self._challenge is not None)
                if secret is None and self._challenge is not None:
                    raise ConnectFailed(
                        f"the monitor at {self._address} asks for a secret; add ,secret-file=PATH"
                    )
            await self.execute("qmp_capabilities")
        except (ChannelBroken, QMPError) as error:
            raise ConnectFailed(str(error)) from error

    async def _prove(self, secret: bytes) -> None:
        """Prove that this side knows the secret, and have the monitor prove it too."""
        while self._challenge is None:
            await self._read_for_all(lambda: bool(self.greeting) or self._challenge is not None)
            if self.greeting:
                raise ConnectFailed(
                    f"the monitor at {self._address} does not ask for a secret; perhaps it is not yours"
                )
        proofs = Proofs(secret, self._challenge, new_nonce())
        reply = await self.execute(PROVE, {"nonce": proofs.of_client, "proof": proofs.make("client")})
        if not (isinstance(reply, dict) and proofs.check("server", str(reply.get("proof")))):
            raise ConnectFailed(f"the monitor at {self._address} does not know the secret; it is not yours")

    def _encode(self, command: str, arguments: Mapping[str, object] | None, fds: Sequence[int]) -> _Outgoing:
        if fds and self._socket.family != socket.AF_UNIX:
            raise QMPError(f"descriptors can be passed over a Unix socket only, not to {self._address}")
        self._last_id += 1
        message: dict[str, object] = {"execute": command, "id": self._last_id}
        if arguments is not None:
            message["arguments"] = arguments
        return _Outgoing(self._last_id, msgspec.json.encode(message) + b"\n", fds)

    async def _flush(self) -> None:
        """Send what waits: this task's command, and the rest of one whose task was cancelled."""
        async with self._sending:
            while self._outgoing:
                self._check()
                try:
                    ended = await self._outgoing[0].send(self._socket)
                except (OSError, trio.ClosedResourceError) as error:
                    self._check()
                    raise self._break(_WORDS) from error
                if ended:
                    self._outgoing.popleft()

    async def _read_for_all(self, enough: Callable[[], bool]) -> None:
        """Read once, and hand out what has come, unless another task has read what makes it ``enough``."""
        async with self._reading:
            if enough():
                return
            self._check()
            try:
                data = await self._socket.recv(_READ)
            except (OSError, trio.ClosedResourceError) as error:
                self._check()
                raise self._break(_WORDS) from error
            if not data:
                raise self._break(_WORDS)
            self._input += data
            while (end := self._input.find(b"\n", self._scanned)) >= 0:
                line = bytes(memoryview(self._input)[:end])
                del self._input[: end + 1]
                self._scanned = 0
                self._dispatch(line)
            self._scanned = len(self._input)
            if self._scanned > _LONGEST_LINE:
                raise self._break(f"has sent a message of more than {_LONGEST_LINE} bytes")

    def _dispatch(self, line: bytes) -> None:
        try:
            message = _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._break("does not speak QMP") from error
        if message.event is not None:
            self._keep(message)
        elif message.greeting is not None:
            self.greeting = message.greeting
        elif message.challenge is not None:
            self._challenge = message.challenge.nonce
        elif message.request_id in self._replies:
            self._replies[message.request_id] = message
        elif (
            message.request_id is None and message.error is not None
        ):  # of no command, so it is about all of them
            raise self._break(f"says: {message.error.desc}")

    def _keep(self, message: _Message) -> None:
        assert message.event is not None
        stamp = message.timestamp
        when = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        if len(self._events) >= _MOST_EVENTS:
            self._events.popleft()
            self.dropped_events += 1
        self._events.append(Event(message.event, message.data, when))

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    def _break(self, words: str) -> ChannelBroken:
        self._failure = ChannelBroken(f"the monitor at {self._address} {words}")
        return self._failure


_WORDS = "has closed the connection"


class _Error(msgspec.Struct, frozen=True):
    desc: str
    class_: str = msgspec.field(name="class", default="GenericError")


class _Challenge(msgspec.Struct, frozen=True):
    nonce: str


class _Message(msgspec.Struct, frozen=True):
    """Whatever a monitor sends; what is None was not in it."""

    result: Any = msgspec.field(name="return", default=None)
    error: _Error | None = None
    request_id: int | None = msgspec.field(name="id", default=None)
    event: str | None = None
    data: dict[str, Any] = {}
    timestamp: dict[str, Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]] = {}
    greeting: dict[str, Any] | None = msgspec.field(name="QMP", default=None)
    challenge: _Challenge | None = msgspec.field(name=CHALLENGE, default=None)


_decoder = msgspec.json.Decoder(_Message)


class _Outgoing:
    """A command on its way, with descriptors of its own, which leave with its first byte."""

    def __init__(self, request_id: int, text: bytes, fds: Sequence[int]) -> None:
        self.request_id = request_id
        self.begun = False
        self._left = memoryview(text)
        self._fds: list[int] = []
        try:
            for fd in fds:
                self._fds.append(os.dup(fd))
        except OSError:
            self.close_fds()
            raise

    async def send(self, sock: trio.socket.SocketType) -> bool:
        """Send some of it; whether that was the rest."""
        if self._fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))
            sent = await sock.sendmsg([self._left], [rights])
            self.close_fds()
        else:
            sent = await sock.send(self._left)
        self.begun = True
        self._left = self._left[sent:]
        return not self._left

    def close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


class _Events:
    def __init__(self, client: QMPClient) -> None:
        self._client = client

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Event:
        try:
            return await self._client.next_event()
        except ChannelClosed:
            raise StopAsyncIteration from None
