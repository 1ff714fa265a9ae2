"""The two ends of a channel under test, and ways of moving bytes from one to the other.

The checks of `kvmmig.testing.conformance` and of `kvmmig.testing.plans` are made of these.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import trio
import trio.testing

from kvmmig.testing._ends import Ends, Nonconformance
from kvmmig.transport import ReceiveChannel, SendChannel


@cache
def incompressible() -> memoryview:
    """64 MiB that a channel can make nothing smaller of."""
    return memoryview(np.random.default_rng(6).bytes(64 << 20))


def split(chance: random.Random, data: bytes, start: int) -> list[memoryview]:
    """Some of what is left of ``data``, in buffers of random sizes, some of them tiny, some of them many."""
    view = memoryview(data)
    largest = chance.choice((1, 7, 4096, 100_000, len(data)))
    buffers = []
    for _ in range(chance.choice((1, 2, 17, 1500))):
        if start == len(data):
            break
        size = chance.randint(1, min(largest, len(data) - start))
        buffers.append(view[start : start + size])
        start += size
    return buffers


async def offer(sender: SendChannel, buffers: list[memoryview]) -> int:
    offered = sum(len(buffer) for buffer in buffers)
    accepted = await sender.send_some(buffers)
    require(1 <= accepted <= offered, f"send_some was offered {offered} bytes and says it took {accepted}")
    return accepted


async def send_all(sender: SendChannel, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[await offer(sender, [view]) :]


async def receive_all(receiver: ReceiveChannel, cancels: random.Random | None = None) -> bytes:
    got = bytearray()
    buffer = memoryview(bytearray(300_000))
    while True:
        count = -1
        if cancels is None:
            with require_checkpoints("receive_some"):
                count = await receiver.receive_some(buffer)
        else:
            with random_cancel(cancels):
                count = await receiver.receive_some(buffer[: cancels.randint(1, len(buffer))])
        if count == 0:
            return bytes(got)
        if count > 0:
            got += buffer[:count]


async def transfer(
    ends: Ends,
    send: Callable[[SendChannel], Awaitable[None]],
    receive: Callable[[ReceiveChannel], Awaitable[bytes]] = receive_all,
) -> tuple[bytes, ReceiveChannel]:
    """Everything that ``send`` sends, followed by an aclose, and the receiver, which is at its end."""
    got = b""

    async def sending() -> None:
        await send(ends.sender)
        await ends.sender.aclose()

    async def receiving() -> ReceiveChannel:
        nonlocal got
        receiver = await ends.receive()
        got = await receive(receiver)
        return receiver

    if ends.stored:
        await sending()
        receiver = await receiving()
        return got, receiver
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        receiver = await receiving()
    return got, receiver


@contextmanager
def require_checkpoints(name: str) -> Iterator[None]:
    try:
        with trio.testing.assert_checkpoints():
            yield
    except AssertionError as error:
        raise Nonconformance(f"{name} returned without a checkpoint") from error


def random_cancel(chance: random.Random) -> trio.CancelScope:
    """A scope that is cancelled already, or soon, or never."""
    kind = chance.randrange(4)
    if kind == 0:
        scope = trio.CancelScope()
        scope.cancel()
        return scope
    if kind == 1:
        return trio.move_on_after(chance.uniform(0, 0.002))
    return trio.CancelScope()


@contextmanager
def raises(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    except Exception as error:
        raise Nonconformance(f"{what} raised {error!r}; it must raise {kind.__name__}") from error
    raise Nonconformance(f"{what} raised nothing; it must raise {kind.__name__}")


def require_same(got: bytes, sent: bytes) -> None:
    require(len(got) == len(sent), f"{len(sent)} bytes were accepted, {len(got)} arrived")
    if got != sent:
        where = next(i for i, (a, b) in enumerate(zip(got, sent, strict=True)) if a != b)
        raise Nonconformance(f"the bytes that arrived differ from those that were accepted, from {where} on")


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise Nonconformance(sentence)


async def receive_some_of(receiver: ReceiveChannel, size: int) -> bytes:
    """``size`` bytes, or all that there are before the end."""
    got = bytearray()
    buffer = memoryview(bytearray(min(size, 300_000)))
    while len(got) < size and (count := await receiver.receive_some(buffer[: size - len(got)])):
        got += buffer[:count]
    return bytes(got)
