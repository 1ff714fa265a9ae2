"""``secret+tcp:HOST:PORT?secret.key.file=PATH``: both sides prove that they know one secret.

Before anything else is said, over the channel below::

    source -> destination    "kvmmig secret 1\\n" | 32 random bytes
    destination -> source    "kvmmig secret 1\\n" | 32 random bytes
    source -> destination    HMAC(secret, "source"      | both random parts | the channel's binding)
    destination -> source    y | HMAC(secret, "destination" | the same)            or n
    source -> destination    y                                                    or n

HMAC-SHA256. Each proof says whose it is, so it can't be sent back to its maker; it holds for these random
bytes only, so it can't be used again. The source proves first: whoever only scans a destination's port gets
nothing to guess the secret from. Over ``tls+`` the proof is bound to that one TLS connection.

It protects the door, and not the way: the bytes behind it are neither encrypted nor authenticated, so who
can change them on the way can take over after the proof. A keyed digest of every piece would cost as much as
a cipher and hide nothing: whoever needs that puts this before ``tls+``.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import cast

import trio

from kvmmig.errors import BadURI, ConnectFailed, TransportError
from kvmmig.transport import (
    AnyChannel,
    Channel,
    Option,
    PassingChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
)

_log = logging.getLogger("kvmmig.transport")

_HELLO = b"kvmmig secret 1\n"
_RANDOM = 32  # bytes
_PROOF = 32  # bytes: SHA-256
_SHORTEST = 16  # bytes. Its proof can be tried offline by whoever has heard it, so guesses must be hopeless
_YES, _NO = b"y", b"n"
_LAST_WORDS = 2.0  # seconds
_STRANGER = " does not know the secret, or somebody stands between it and this side"
_REFUSED = " says that this side does not know the secret; do both have the same file?"


class SecretWrapper(Wrapper):
    """Lets nobody in who does not know the secret, and goes to nobody who does not."""

    summary = "both sides prove that they know a secret; it encrypts nothing"
    syntax = "secret+TRANSPORT:...?secret.key.file=PATH"
    options = (Option("key", "what both sides know, at least 16 bytes", secret=True),)

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        if inner.stores or inner.arrives_at_once:
            raise BadURI(
                f"{str(uri)!r}: secret+ needs somebody at the other end, and {uri.scheme}: only stores"
            )
        self._key = self.option("key").encode(errors="surrogateescape")
        if not self._key:
            raise BadURI(f"{str(uri)!r}: say where the secret is, by secret.key.file=PATH")
        if len(self._key) < _SHORTEST:
            raise BadURI(
                f"{str(uri)!r}: the secret has {len(self._key)} bytes and must have {_SHORTEST} at least; "
                "make one by openssl rand -hex 32"
            )

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        if not channel.two_way:
            raise ConnectFailed(f"secret+ needs a way back, and {channel.peer} has none")
        talk = _Talk(cast(Channel, channel), self._key)
        try:
            if side is Side.SOURCE:
                await talk.as_source()
            else:
                await talk.as_destination()
        except TransportError as error:
            await _end(talk.below)
            if isinstance(error, ConnectFailed):
                raise
            raise ConnectFailed(f"{channel.peer} did not prove that it knows the secret: {error}") from error
        _log.info("%s knows the secret", channel.peer)
        known = PassingChannel(channel)
        known.proved = True
        yield known


class _Talk:
    def __init__(self, below: Channel, key: bytes) -> None:
        self.below = below
        self._key = key

    async def as_source(self) -> None:
        ours = secrets.token_bytes(_RANDOM)
        await self._say(_HELLO + ours)
        theirs = await self._random()
        await self._say(self._proof(Side.SOURCE, ours, theirs))
        if await self._hear(1) != _YES:
            raise ConnectFailed(f"{self.below.peer}{_REFUSED}")
        proof = await self._hear(_PROOF)
        known = hmac.compare_digest(proof, self._proof(Side.DESTINATION, ours, theirs))
        await self._say(_YES if known else _NO)
        if not known:
            raise ConnectFailed(f"{self.below.peer}{_STRANGER}")

    async def as_destination(self) -> None:
        theirs, ours = await self._random(), secrets.token_bytes(_RANDOM)
        await self._say(_HELLO + ours)
        proof = await self._hear(_PROOF)
        if not hmac.compare_digest(proof, self._proof(Side.SOURCE, theirs, ours)):
            await self._say(_NO)
            raise ConnectFailed(f"{self.below.peer}{_STRANGER}")
        await self._say(_YES + self._proof(Side.DESTINATION, theirs, ours))
        if await self._hear(1) != _YES:
            raise ConnectFailed(f"{self.below.peer}{_REFUSED}")

    def _proof(self, side: Side, of_source: bytes, of_destination: bytes) -> bytes:
        # Every part but the last has a fixed length, or ends in what the next can't begin with.
        text = b"\n".join((_HELLO + side.value.encode(), of_source + of_destination + self.below.binding))
        return hmac.digest(self._key, text, "sha256")

    async def _random(self) -> bytes:
        hello = await self._hear(len(_HELLO), hint="; is secret+ in its URI too?")
        if hello != _HELLO:
            raise ConnectFailed(f"{self.below.peer} does not speak of a secret; is secret+ in its URI too?")
        return await self._hear(_RANDOM)

    async def _say(self, words: bytes) -> None:
        rest = memoryview(words)
        while rest:
            rest = rest[await self.below.send_some([rest]) :]

    async def _hear(self, count: int, hint: str = "") -> bytes:
        """No byte more: what comes behind is for others."""
        words = bytearray(count)
        rest = memoryview(words)
        while rest:
            got = await self.below.receive_some(rest)
            if got == 0:
                raise ConnectFailed(
                    f"{self.below.peer} ended the connection and did not prove that it knows the secret{hint}"
                )
            rest = rest[got:]
        return bytes(words)


async def _end(channel: Channel) -> None:
    """Have the last words read: an abort could overtake them."""
    with trio.move_on_after(_LAST_WORDS), suppress(TransportError):  # what went wrong first is what counts
        await channel.aclose()
