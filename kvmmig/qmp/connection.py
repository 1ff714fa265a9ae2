"""One client's connection: a task that reads and answers in order, and a task that sends."""

from __future__ import annotations

import array
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable

import msgspec
import trio

from kvmmig.errors import KvmmigError
from kvmmig.qmp.framing import Malformed, MessageSplitter
from kvmmig.qmp.messages import (
    NotQMP,
    QMPError,
    Request,
    encode_challenge,
    encode_error,
    encode_reply,
    not_a_message,
    parse_id,
    parse_members,
    parse_proof,
    parse_request,
)
from kvmmig.qmp.outbox import Outbox
from kvmmig.qmp.secret import PROVE, Proofs, new_nonce
from kvmmig.qmp.session import Session
from kvmmig.qmp.table import CommandTable

_log = logging.getLogger(__name__)

_READ = 8 << 10  # bytes
_SCAN = 1 << 10  # bytes: if all of them are brackets, finding out where they end takes about 0.5 ms
_SEND = 256 << 10  # bytes: one call copies them in 0.1 ms
_WORK = 0.0005  # seconds of answering at a time: the same loop moves a guest
_REST = 2.0  # seconds of rest for each second of it: however much a client asks, two thirds are for others
_MOST_FDS = 16  # in one read; the kernel closes the rest
_MAX_REPLY = 4 << 20  # bytes
#: Seconds that a client has from its greeting, or from the challenge, until it has negotiated.
NEGOTIATION_LIMIT = 30.0


class Connection:
    """Takes over ``sock`` and closes ``session``. `run` it once; a cancel ends it, and so does the client.

    A command that has begun is finished even if its client leaves meanwhile; only a cancel from outside
    ends it. Until a client has negotiated it has `NEGOTIATION_LIMIT` seconds, and must send JSON objects and
    nothing else: a browser that was told to post something here gets no command in.

    With a ``secret`` it is asked to prove that it knows it before it is greeted; ``on_stranger`` is told, in
    words that go behind its name, when it does not.
    """

    def __init__(
        self,
        sock: trio.socket.SocketType,
        session: Session,
        table: CommandTable,
        *,
        greeting: bytes,
        stall_limit: float,
        secret: bytes | None = None,
        on_stranger: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.session = session
        self._socket = sock
        self._table = table
        self._greeting = greeting
        self._stall_limit = stall_limit
        self._unproved = secret
        self._on_stranger = on_stranger
        self._nonce = new_nonce()
        self._dismissed = False  # it has said what ends the connection
        self._outbox = Outbox()
        self._unsent = memoryview(b"")  # of what was taken from the outbox
        self._worked = 0.0  # seconds that have not been rested for
        self._in_a_row = 0  # requests that came without a pause
        self._since = 0.0  # when what it does now began, by the clock of `time.perf_counter`

    def send_event(self, line: bytes) -> None:
        self._outbox.put_event(line)

    async def run(self) -> None:
        """Serve until the client ends the connection, breaks it, or reads nothing for too long."""
        self._outbox.put_reply(self._greeting if self._unproved is None else encode_challenge(self._nonce))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                with trio.move_on_after(NEGOTIATION_LIMIT) as until_negotiated:
                    await self._read(until_negotiated)
                if until_negotiated.cancelled_caught:
                    self._outbox.put_reply(
                        encode_error(f"there was no 'qmp_capabilities' for {NEGOTIATION_LIMIT:g} s")
                    )
                self._outbox.end()
        finally:
            self._send_without_waiting()
            self._socket.close()
            self.session.close()

    async def _read(self, until_negotiated: trio.CancelScope) -> None:
        splitter = MessageSplitter()
        while True:
            await self._outbox.room()
            self._since = time.perf_counter()
            try:
                data = await self._receive()
            except OSError:
                return
            if not data:
                return
            now = time.perf_counter()
            self._note_wait(now - self._since)
            self._since = now
            for start in range(0, len(data), _SCAN):
                for message in splitter.feed(data[start : start + _SCAN]):
                    self._in_a_row += 1
                    self._outbox.put_reply(await self._answer(message))
                    if self._dismissed or self.session.ended:
                        return
                    if self.session.negotiated:
                        until_negotiated.deadline = math.inf
                    await self._outbox.room()
                    if self._outbox.closed:
                        return
                    await self._breathe()
                await self._breathe()

    def _note_wait(self, seconds: float) -> None:
        """Waiting for a request is a rest. Who asks, waits for the answer and thinks does not pipeline."""
        self._worked = max(self._worked - seconds / _REST, 0.0)
        if seconds > _WORK:
            self._in_a_row = 0

    async def _breathe(self) -> None:
        """Rest, after so much work. A command that had to wait itself was not all work."""
        self._worked += time.perf_counter() - self._since
        if self._worked > _WORK:
            # A single request is no flood: its client may ask the next one after a millisecond.
            rest = 0.0 if self._in_a_row == 1 else min(self._worked, 2 * _WORK) * _REST
            await trio.sleep(rest)
            self._worked = 0.0
        self._since = time.perf_counter()

    async def _receive(self) -> bytes:
        if self._socket.family != socket.AF_UNIX:
            return await self._socket.recv(_READ)
        space = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)
        data, ancillary, _, _ = await self._socket.recvmsg(_READ, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self.session.receive_fds(fds)
        return data

    async def _answer(self, message: bytes | Malformed) -> bytes:
        request_id: msgspec.Raw | None = None
        try:
            if isinstance(message, Malformed):
                raise not_a_message(message.reason, is_value=message.is_value)
            members = parse_members(message)
            request_id = parse_id(members)
            request = parse_request(members, out_of_band=self.session.out_of_band)
            if self._unproved is not None:
                proof = self._check_proof(request, self._unproved)
                return encode_reply({"proof": proof}, request_id) + self._greeting
            if request.out_of_band:
                self._table.check_out_of_band(request.execute)
            result = await self._table.execute(self.session, request.execute, request.arguments)
            reply = encode_reply(result, request_id)
            if len(reply) > _MAX_REPLY:
                raise QMPError(f"the reply has {len(reply)} bytes, and may have {_MAX_REPLY}")
            return reply
        except QMPError as error:
            if self._unproved is not None:  # it has one try
                self._dismiss("does not know the monitor's secret")
            elif isinstance(error, NotQMP) and not self.session.negotiated:
                self._dismiss("does not speak QMP")
            return encode_error(error.desc, error.error_class, request_id)
        except KvmmigError as error:
            return encode_error(str(error), request_id=request_id)
        except Exception as error:
            # A bug in one command must not end the process: what it looks after is worth more.
            _log.exception("a command of %s failed in a way that nobody has foreseen", self.session.peer)
            words = f"a bug in kvmmig: {type(error).__name__}: {error}"
            return encode_error(words, request_id=request_id)

    def _check_proof(self, request: Request, secret: bytes) -> str:
        """The monitor's own proof, where the client's is good. Raises `QMPError`."""
        if request.execute != PROVE:
            raise QMPError(f"prove first, by '{PROVE}', that you know this monitor's secret")
        theirs = parse_proof(request)
        proofs = Proofs(secret, self._nonce, theirs.nonce)
        if not proofs.check("client", theirs.proof):
            raise QMPError("that does not prove that you know this monitor's secret")
        self._unproved = None
        return proofs.make("server")

    def _dismiss(self, words: str) -> None:
        self._dismissed = True
        self._on_stranger(words)

    async def _send(self) -> None:
        while chunk := await self._outbox.take():
            self._unsent = memoryview(chunk)
            while self._unsent:
                sent = 0
                with trio.move_on_after(self._stall_limit):
                    with contextlib.suppress(OSError):
                        sent = await self._socket.send(self._unsent[:_SEND])
                if not sent:
                    self._drop()
                    return
                self._outbox.sent(sent)
                self._unsent = self._unsent[sent:]

    def _drop(self) -> None:
        """The client is gone, or reads nothing: the reading task, wherever it waits, comes to its end."""
        self._outbox.close()
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def _send_without_waiting(self) -> None:
        """What was answered last, such as a "quit", is worth a try when all of it ends."""
        try:
            while not self._outbox.closed:
                if not self._unsent:
                    self._unsent = memoryview(self._outbox.take_now())
                    if not self._unsent:
                        return
                self._unsent = self._unsent[os.write(self._socket.fileno(), self._unsent) :]
        except OSError:  # it is gone, or does not read
            pass
