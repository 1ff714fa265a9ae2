"""``checksum+TRANSPORT:...``: each piece carries a digest of its bytes and of its place in the stream.

Damage on the way, and pieces that are lost, repeated or out of order, break the channel before their bytes
are taken. Against somebody who means it, it protects nothing: that is what ``tls+`` is for.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import xxhash

from kvmmig.transport import AnyChannel, Side, Wrapper
from kvmmig.transport.toolkit import reframed

_SIZE = 8  # bytes of XXH3


class ChecksumWrapper(Wrapper):
    """Finds out what was damaged on the way."""

    summary = "finds damage on the way; both sides have it"
    syntax = "checksum+TRANSPORT:..."

    def wrap(self, channel: AnyChannel, *, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
        return reframed(channel, _Signer().sign, _Signer().check, side=side, name="checksum")


class _Signer:
    """One direction: it counts its pieces."""

    def __init__(self) -> None:
        self._count = 0

    def sign(self, piece: bytes | bytearray) -> bytes:
        return b"".join((self._digest(piece), piece))

    def check(self, frame: bytes | bytearray) -> memoryview:
        view = memoryview(frame)
        if self._digest(view[_SIZE:]) != frame[:_SIZE]:
            raise ValueError(f"piece {self._count} was damaged on the way, or is not the one that is due")
        return view[_SIZE:]

    def _digest(self, piece: bytes | bytearray | memoryview) -> bytes:
        self._count += 1
        return xxhash.xxh3_64_digest(piece, seed=self._count)
