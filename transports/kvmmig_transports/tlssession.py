"""One TLS connection without I/O: bytes in, bytes out. Whoever calls it does so in threads.

OpenSSL releases the GIL while it encrypts and decrypts, and one connection must not be used by two threads at
a time: hence the lock. A piece is encrypted in parts that stay in a core's cache.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

#: Bytes that are encrypted in one call of OpenSSL.
PART = 1 << 18


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """What one attempt has led to."""

    outgoing: bytes  # to be sent, also where there is an error: it may be the alert that says why
    value: T | None = None
    error: ssl.SSLError | None = None  # `ssl.SSLWantReadError`: more bytes are wanted first


class Session:
    """An `ssl.SSLObject` over two memory buffers."""

    def __init__(self, context: ssl.SSLContext, *, server: bool, host: str) -> None:
        """``host`` is the name that the other side's certificate must have, if the context checks it."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=host or None
        )
        self._lock = threading.Lock()
        self._closed = False

    def attempt(self, call: Callable[[ssl.SSLObject], T], incoming: bytes = b"") -> Step[T]:
        """Take in ``incoming``, then do ``call``. For the handshake, where all is small."""
        with self._lock:
            if incoming:
                self._incoming.write(incoming)
            try:
                value = call(self._tls)
            except ssl.SSLError as error:
                return Step(self._outgoing.read(), error=error)
            return Step(self._outgoing.read(), value)

    def seal(self, pieces: Sequence[memoryview]) -> list[memoryview]:
        """Encrypt all of ``pieces``, which must not change meanwhile."""
        sealed = []
        for piece in pieces:
            for begin in range(0, len(piece), PART):
                part = piece[begin : begin + PART]
                with self._lock:
                    while part:
                        part = part[self._tls.write(part) :]
                    sealed.append(memoryview(self._outgoing.read()))
        return sealed

    def open(self, chunks: Sequence[memoryview], out: memoryview) -> int:
        """Take in ``chunks`` and decrypt into ``out``; how many bytes it now has.

        Where ``out`` is full there may be more. Nothing is held back otherwise, but for part of a record.
        Raises `ssl.SSLError`.
        """
        count = 0
        with self._lock:
            for chunk in chunks:
                self._incoming.write(chunk)
                count += self._read(out[count:])
            if not chunks:
                count += self._read(out)
        return count

    @property
    def closed(self) -> bool:
        """Whether the other side has said that its stream ends here."""
        return self._closed

    def close(self) -> list[memoryview]:
        """What tells the other side that the stream ends here: close_notify."""
        with self._lock:
            with suppress(ssl.SSLError):  # the other side's answer is not waited for
                self._tls.unwrap()
            return [memoryview(self._outgoing.read())]

    def certificate(self) -> tuple[bytes, dict[str, Any]]:
        """The other side's: as it is, and what was verified of it. Both empty where it showed none."""
        return self._tls.getpeercert(binary_form=True) or b"", dict(self._tls.getpeercert() or {})

    def protocol(self) -> str:
        """What both sides have agreed to speak inside, by ALPN."""
        return self._tls.selected_alpn_protocol() or ""

    def binding(self) -> bytes:
        """What both ends know and no third one can bring about: the source's Finished message.

        It is a keyed hash of the whole handshake, certificates included. RFC 8446, section 4.4.4.
        """
        return self._tls.get_channel_binding("tls-unique") or b""

    def _read(self, out: memoryview) -> int:
        count = 0
        try:
            while count < len(out) and not self._closed:
                # one record, 16 KiB at most, is all that OpenSSL gives at a time
                got = cast(int, self._tls.read(len(out) - count, out[count:]))
                count += got
                self._closed = got == 0
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._closed = True
        return count
