"""``file:PATH?direct=on|off&replace=seen|any|none``: a saved guest in a file, written and read by threads.

What writes to it at any offset makes an image; behind a wrapper it is a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from kvmmig.errors import BadURI
from kvmmig.transport import Listener, Option, RandomAccessChannel, SendChannel, Transport, TransportURI
from kvmmig.transport.toolkit import (
    REPLACE_OPTION,
    AtOnceListener,
    BlockFileReceiver,
    BlockFileSender,
    RandomAccessFile,
    Replace,
)


class FileTransport(Transport):
    """Saves to, or restores from, one regular file."""

    summary = "a file on a disk, written by threads with O_DIRECT"
    syntax = "file:PATH[?direct=on|off&replace=seen|any|none]"
    options = (
        Option("direct", "go around the page cache with O_DIRECT", "on", ("on", "off")),
        REPLACE_OPTION,
    )
    target_is_path = True
    stores = True
    random_access = True
    arrives_at_once = True

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no file: write file:PATH, such as file:/var/tmp/guest.img")
        self._direct = self.option("direct") == "on"
        self._replace = Replace(self.option("replace"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        """The file at PATH, if there is one, stays as it is until the channel's `aclose`."""
        opening = BlockFileSender.open(self.uri.target, direct=self._direct, replace=self._replace)
        async with await opening as channel:
            yield channel

    @asynccontextmanager
    async def connect_random_access(self) -> AsyncIterator[RandomAccessChannel]:
        """As `connect`."""
        opening = RandomAccessFile.open(self.uri.target, direct=self._direct, replace=self._replace)
        async with await opening as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await trio.lowlevel.checkpoint()
        yield AtOnceListener(self.uri, partial(BlockFileReceiver.open, self.uri.target, direct=self._direct))
