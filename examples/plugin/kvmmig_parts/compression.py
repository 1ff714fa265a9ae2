"""``zlib+TRANSPORT:...``: compressed on the way. Both sides have it in their URI."""

from __future__ import annotations

import zlib
from contextlib import AbstractAsyncContextManager
from functools import partial

from kvmmig.transport import AnyChannel, Option, Side, Wrapper
from kvmmig.transport.toolkit import reframed

_MOST = 4 << 20  # bytes that a frame may hold; a hostile one of a kilobyte could hold a thousand of them


class ZlibWrapper(Wrapper):
    summary = "compresses what is sent"
    syntax = "zlib+TRANSPORT:..."
    options = (Option("level", "1 is fast, 9 is small", default="1", choices=tuple("123456789")),)

    def wrap(self, channel: AnyChannel, *, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
        compress = partial(zlib.compress, level=int(self.option("level")))
        return reframed(channel, compress, _decompress, side=side, name="zlib")


def _decompress(frame: bytes | bytearray) -> bytes:
    whole = zlib.decompressobj()
    data = whole.decompress(frame, _MOST)
    if not whole.eof:
        raise ValueError("it is cut off, or too large")
    return data
