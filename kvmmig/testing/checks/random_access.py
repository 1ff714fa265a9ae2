"""A transport with random access: bytes are found at their offsets, the last ones that were accepted."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import ConnectFailed, TransportError
from kvmmig.testing._ends import Maker, NotApplicable, hosting, promise, transports
from kvmmig.testing._transfer import raises, receive_all, require
from kvmmig.transport import RandomAccessChannel, Transport

_PAGE = 4096
_PAGES = 900
_ROUNDS = 4


@asynccontextmanager
async def _connected(maker: Maker) -> AsyncIterator[tuple[RandomAccessChannel, Transport]]:
    source, destination = transports(maker)
    source = source or destination
    if not source.random_access:
        raise NotApplicable("it has no random access")
    async with hosting() as hosts:
        channel = await hosts.enter(source.connect_random_access)
        try:
            yield channel, destination
        finally:
            channel.abort()


async def _read(destination: Transport) -> bytes:
    async with destination.listen() as listener, listener.accept() as receiver:
        return bytes(await receive_all(receiver))


async def _write_all(channel: RandomAccessChannel, pieces: list[tuple[int, memoryview]]) -> None:
    while pieces:
        offered = sum(len(data) for _, data in pieces)
        count = await channel.write_some(pieces)
        require(
            0 < count <= offered and count % _PAGE == 0,
            f"write_some was offered {offered} bytes in pages and says it took {count}",
        )
        while count:
            offset, data = pieces.pop(0)
            if len(data) > count:
                pieces.insert(0, (offset + count, data[count:]))
            count -= min(count, len(data))


@promise
async def check_bytes_are_found_at_their_offsets(maker: Maker) -> None:
    """What is written in any order, and again, is found at its offsets; what never was is zero."""
    chance = random.Random(21)
    expected = bytearray(_PAGES * _PAGE)
    async with _connected(maker) as (channel, destination):
        for turn in range(_ROUNDS):
            pages = [*range(0, _PAGES - 7, 7), _PAGES - 1]
            chance.shuffle(pages)
            pieces = []
            for page in pages:
                size = _PAGE * min(chance.randint(1, 6), _PAGES - page)
                odd = chance.randrange(2)  # buffers need not begin at a page
                data = memoryview(bytes(odd) + chance.randbytes(size))[odd:]
                pieces.append((page * _PAGE, data))
                expected[page * _PAGE : page * _PAGE + size] = data
            await _write_all(channel, pieces)
            await (channel.settle if turn % 2 else channel.flush)()
        await channel.aclose()
        require(await _read(destination) == expected, "what can be read is not what was written")


@promise
async def check_settled_buffers_can_be_used_again(maker: Maker) -> None:
    """What is done to a buffer after settle is not seen in what was written from it."""
    data = bytearray(b"a" * (_PAGES * _PAGE))
    async with _connected(maker) as (channel, destination):
        await _write_all(channel, [(0, memoryview(data))])
        await channel.settle()
        data[:] = b"b" * len(data)
        await channel.aclose()
        got = await _read(destination)
        require(got == b"a" * len(data), "a buffer was read after settle had returned")


@promise
async def check_cancelled_write_accepts_nothing(maker: Maker) -> None:
    """A write_some that is cancelled has accepted nothing."""
    async with _connected(maker) as (channel, destination):
        await _write_all(channel, [(0, memoryview(b"a" * _PAGE)), (_PAGE, memoryview(b"b" * _PAGE))])
        await channel.settle()
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.write_some([(0, memoryview(b"c" * _PAGE))])
        require(scope.cancelled_caught, "write_some ignored a cancel")
        await channel.aclose()
        got = await _read(destination)
        require(got == b"a" * _PAGE + b"b" * _PAGE, "what a cancelled write_some was offered was written")


@promise
async def check_aborted_write_never_appears(maker: Maker) -> None:
    """What was written before an abort can't be read, and the channel is closed."""
    async with _connected(maker) as (channel, destination):
        await _write_all(channel, [(0, memoryview(bytes(8 * _PAGE)))])
        await channel.flush()
        channel.abort()
        with raises(TransportError, "write_some on an aborted channel"):
            await channel.write_some([(0, memoryview(bytes(_PAGE)))])
        await channel.aclose()
        with raises(ConnectFailed, "reading what an aborted channel had written"):
            await _read(destination)
