"""``tls+tcp:HOST:PORT?tls.dir=/etc/pki/kvmmig``: encrypted, and each side knows whom it talks to.

TLS 1.3 by Python's own ssl. Both sides show certificates, and each says to the other, inside of the
encryption, whether it is content, before anything else is said::

    destination -> source    ok            or why not
    source -> destination    ok            or why not

Without that the source would learn only with its first answer that it is not welcome, because in TLS 1.3 its
own handshake is complete before the destination has seen its certificate.
"""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, cast

import trio

from kvmmig.errors import BadURI, ConnectFailed, TransportError
from kvmmig.transport import (
    AnyChannel,
    Channel,
    Listener,
    Option,
    SendChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
)
from kvmmig_transports import tlscredentials
from kvmmig_transports.tlschannel import tls_channel
from kvmmig_transports.tlssession import Session

T = TypeVar("T")
_log = logging.getLogger("kvmmig.transport")

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LONGEST_WORD = 400  # bytes that the other side may say
_LAST_WORDS = 2.0  # seconds in which an alert may still go out


class TlsWrapper(Wrapper):
    """Encrypts, and says who is at the other end."""

    summary = "encrypts a connection, by TLS 1.3; both sides show certificates"
    syntax = "tls+TRANSPORT:...?tls.dir=PATH[&tls.host=NAME&tls.fingerprint=SHA256&tls.mutual=on|off]"
    options = (
        Option("dir", "the directory of ca-cert.pem, and server-cert.pem, server-key.pem or client-..."),
        Option("host", "the name in the other side's certificate; for a source of tcp: it is the URI's host"),
        Option("fingerprint", "the SHA-256 of the other side's certificate, in hex, whatever its name"),
        Option("mutual", "whether the destination wants a certificate too", "on", ("on", "off")),
    )

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        if inner.stores or inner.arrives_at_once:
            raise BadURI(f"{str(uri)!r}: tls+ needs somebody at the other end, and {uri.scheme}: only stores")
        self._dir = self.option("dir")
        if not self._dir:
            raise BadURI(f"{str(uri)!r}: say where the certificates are, by tls.dir=PATH")
        self._mutual = self.option("mutual") == "on"
        self._fingerprint = self.option("fingerprint").replace(":", "").lower()
        if self._fingerprint and not _FINGERPRINT.fullmatch(self._fingerprint):
            raise BadURI(
                f"{str(uri)!r}: tls.fingerprint is not the 64 hex digits of a SHA-256; print them by "
                "openssl x509 -noout -fingerprint -sha256 -in server-cert.pem"
            )
        self._host = self.option("host")
        if self._host.startswith(".") or "\0" in self._host:
            raise BadURI(f"{str(uri)!r}: tls.host={self._host} is no name of a host")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        await self._load(Side.SOURCE)
        async with super().connect() as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """What is wrong with this side's certificates is said now, and not to each client."""
        await self._load(Side.DESTINATION)
        async with super().listen() as listener:
            yield listener

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        if not channel.two_way:
            raise ConnectFailed(f"tls+ needs a way back, and {channel.peer} has none")
        below = cast(Channel, channel)
        # Loaded anew for each: a renewed certificate holds from the next connection on.
        context = await self._load(side)
        host = self._name(side) if side is Side.SOURCE else ""
        session = Session(context, server=side is Side.DESTINATION, host=host)
        who = await _Handshake(session, below).run(side, lambda: self._objection(session, side))
        _log.info("the other side of %s is %s, by its certificate", below.peer, who or "anybody")
        async with tls_channel(session, below) as encrypted:
            encrypted.binding = session.binding()
            encrypted.peer = f"{below.peer} ({who})" if who else below.peer
            encrypted.proved = bool(who)
            yield encrypted

    def _name(self, side: Side) -> str:
        """Whose certificate it must be; empty where that does not matter, or the fingerprint says it."""
        if self._host or self._fingerprint or side is Side.DESTINATION:
            return self._host
        if self.uri.scheme == "tcp":
            return self.uri.target.rpartition(":")[0].strip("[]")
        raise ConnectFailed(
            f"{self.uri}: nothing says whose certificate it must be; add tls.host=NAME or "
            "tls.fingerprint=SHA256"
        )

    async def _load(self, side: Side) -> ssl.SSLContext:
        name = self._name(side)
        return await trio.to_thread.run_sync(
            lambda: tlscredentials.load(self._dir, side, mutual=self._mutual, name_is_checked=bool(name)),
            abandon_on_cancel=True,
            limiter=trio.CapacityLimiter(1),
        )

    def _objection(self, session: Session, side: Side) -> str:
        """What is wrong with the other side beyond what OpenSSL has checked, for that side to read."""
        certificate, verified = session.certificate()
        if session.protocol() != tlscredentials.PROTOCOL:
            return f"the other side does not speak {tlscredentials.PROTOCOL} inside of TLS"
        if self._fingerprint and hashlib.sha256(certificate).hexdigest() != self._fingerprint:
            return "the certificate is not the one with the fingerprint that is expected"
        if side is Side.DESTINATION and self._host and self._host not in _names(verified):
            return f"the certificate is not for {self._host}"
        return ""


class _Handshake:
    """The handshake and the two words behind it, all in threads. Raises `ConnectFailed`."""

    def __init__(self, session: Session, below: Channel) -> None:
        self._session = session
        self._below = below
        self._buffer = memoryview(bytearray(1 << 16))
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, side: Side, objection: Callable[[], str]) -> str:
        """The name in the other side's certificate; empty where it showed none."""
        try:
            await self._do(lambda tls: tls.do_handshake())
            if side is Side.SOURCE:
                await self._hear()
            await self._say(objection())
            if side is Side.DESTINATION:
                await self._hear()
        except ssl.SSLError as error:
            await self._end()
            raise self._failed(tlscredentials.sentence(error)) from error
        except TransportError as error:
            if isinstance(error, ConnectFailed):
                await self._end()
                raise
            raise self._failed(str(error)) from error
        return _name_of(self._session.certificate()[1])

    async def _say(self, objection: str) -> None:
        word = (objection or "ok").encode()[:_LONGEST_WORD]
        await self._do(lambda tls: tls.write(word + b"\n"))
        if objection:
            raise self._failed(objection)

    async def _hear(self) -> None:
        word = b""
        while not word.endswith(b"\n"):
            byte = await self._do(lambda tls: tls.read(1))
            if not byte or len(word) > _LONGEST_WORD:
                raise self._failed("it did not say that all is well")
            word += byte
        text = word.decode(errors="replace").strip()
        if text != "ok":
            said = "".join(letter if letter.isprintable() else "?" for letter in text)
            raise self._failed(f"it says: {said}")

    async def _do(self, call: Callable[[ssl.SSLObject], T]) -> T:
        incoming = b""
        while True:
            step = await trio.to_thread.run_sync(
                self._session.attempt, call, incoming, abandon_on_cancel=True, limiter=self._limiter
            )
            rest = memoryview(step.outgoing)
            while rest:
                rest = rest[await self._below.send_some([rest]) :]
            if step.error is None:
                return cast(T, step.value)
            if not isinstance(step.error, ssl.SSLWantReadError):
                raise step.error
            count = await self._below.receive_some(self._buffer)
            if count == 0:
                raise self._failed("it ended the connection; is tls+ in its URI too?")
            incoming = bytes(self._buffer[:count])

    async def _end(self) -> None:
        """Have the last words read: an abort could overtake them."""
        with trio.move_on_after(_LAST_WORDS), suppress(TransportError):  # the first error is what counts
            await self._below.aclose()

    def _failed(self, reason: str) -> ConnectFailed:
        return ConnectFailed(f"no TLS connection with {self._below.peer}: {reason}")


def _names(verified: dict[str, Any]) -> list[str]:
    """All names of a certificate: those of hosts and addresses, or the common one where it has none."""
    names = [name for kind, name in verified.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if names:
        return names
    return [value for part in verified.get("subject", ()) for key, value in part if key == "commonName"]


def _name_of(verified: dict[str, Any]) -> str:
    name = (_names(verified) or ["a certificate without a name"] * bool(verified) or [""])[0]
    return "".join(letter if letter.isprintable() else "?" for letter in name)
