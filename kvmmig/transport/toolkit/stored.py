"""Channels to and from a store that keeps objects: parts are put, and appear all together or not at all.

The author brings a few functions of the store's; a blocking library's by way of `in_thread`. What is accepted
is copied into a part; full parts are put by tasks of the channel's own, several at a time. Nothing counts
before the commit, which is `aclose`. Whatever else ends the channel discards what was put.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, TransportError
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.line import Call, failure_of, words
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.pumped import pumped_receiver
from kvmmig.transport.toolkit.tasks import own_tasks

Put = Callable[[int, memoryview], Awaitable[object]]
Commit = Callable[[int], Awaitable[object]]
Get = Callable[[int], Awaitable[bytes | bytearray | memoryview]]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("kvmmig.transport")

_PART_SIZE = 8 << 20
_MOST_BYTES = 1 << 20  # copied by one call
_THREAD_GRACE = 0.5  # seconds that a thread's call has for its end, once it is cancelled
_DISCARD_TIME = 1.0  # seconds


@asynccontextmanager
async def stored_sender(
    put: Put, commit: Commit, discard: Call, *, peer: str, part_size: int = _PART_SIZE, parallel: int = 4
) -> AsyncIterator[SendChannel]:
    """A channel into a store, for a transport that `stores <Transport.stores>`. Its tasks live in the block.

    ``put(number, data)`` stores one part. They are numbered from 0 and have ``part_size`` bytes, except the
    last. Up to ``parallel`` of them are put at a time, in any order. ``data`` is the function's to keep, and
    does not change. ``commit(parts)`` makes so many parts one object, durable and visible, or raises; only
    `aclose` calls it, when all of them have been put. ``discard()`` removes what was put: it is called once,
    when no put is under way any more, unless the commit has succeeded.

    All three may be cancelled. A cancelled commit has done nothing; or all, and then it returns, as `aclose`
    does. A discard has a second; the log is told when that was not enough.

    `flush` waits for the parts that are full; the last one goes with the commit. At most ``parallel`` times
    ``part_size`` bytes are held.
    """
    sender = _StoredSender(put, commit, discard, peer, part_size, parallel)
    async with own_tasks() as nursery:
        nursery.start_soon(sender.run)
        async with sender:
            yield sender


@asynccontextmanager
async def stored_receiver(
    get: Get, parts: int, *, peer: str, close: Call | None = None
) -> AsyncIterator[ReceiveChannel]:
    """A channel out of a store: ``get(number)`` for each of so many ``parts``, in order, one part ahead.

    ``close`` is called at the end, also after an abort, and then in a cancelled scope.
    """
    numbers = iter(range(parts))

    async def receive() -> bytes | bytearray | memoryview:
        number = next(numbers, None)
        if number is None:
            return b""
        with _saying(f"can't get part {number} of {peer}"):
            part = await get(number)
        if not part:
            raise ChannelBroken(f"part {number} of {peer} is empty")
        return part

    async with pumped_receiver(receive, peer=peer, close=close) as receiver:
        yield receiver


def in_thread(call: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """``call``, which may block for as long as its disk or its network pleases, as an async function.

    A cancel gives it half a second to end in its own way, so that what follows does not meet it still at
    work. Then it is left behind in its thread, which holds up nobody, not even the end of the process.
    """

    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        shield = trio.CancelScope(shield=True)

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:  # and no more than that: the call may yet return
                shield.deadline = trio.current_time() + _THREAD_GRACE

        async with own_tasks() as nursery:
            nursery.start_soon(watch)
            with shield:
                return await trio.to_thread.run_sync(
                    lambda: call(*args, **kwargs), abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                )
            await trio.lowlevel.checkpoint_if_cancelled()
        raise AssertionError("its grace ends only after a cancel")

    return run


class _StoredSender(SendChannel):
    copies = True
    call_size = _MOST_BYTES

    def __init__(
        self, put: Put, commit: Commit, discard: Call, peer: str, part_size: int, parallel: int
    ) -> None:
        self.peer = peer
        self._put = put
        self._commit = commit
        self._discard = discard
        self._part_size = part_size
        self._parallel = parallel
        self._sending = OneAtATime("sending")
        self._changed = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()  # around the puts
        self._part = bytearray()  # being filled
        self._parts = 0  # that were ever full
        self._jobs: deque[Call] = deque()
        self._unfinished = 0  # jobs, with those that are under way
        self._over = trio.Event()  # no job is under way any more, and none will be
        self._failure: BaseException | None = None
        self._closed = self._committed = False

    async def run(self) -> None:
        """The tasks that put, and the discard behind them."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(self._parallel):
                        nursery.start_soon(self._work)
        finally:
            self._over.set()
            if not self._committed:
                failure = None
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _DISCARD_TIME) as scope:
                    failure = await failure_of(self._discard)
                if scope.cancelled_caught or failure is not None:
                    why = words(failure) if failure else f"that took longer than {_DISCARD_TIME:g} s"
                    _log.warning("what was put into %s could not be discarded: %s", self.peer, why)

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            while self._unfinished >= self._parallel:
                await self._changed.park()
                self._check()
            # Nothing from here on waits, so a cancel can only come while nothing has been accepted.
            before = len(self._part)
            room = min(self._part_size - before, _MOST_BYTES)
            for buffer in buffers:
                self._part += buffer[:room]
                room -= min(len(buffer), room)
                if not room:
                    break
            accepted = len(self._part) - before
            if len(self._part) == self._part_size:
                self._put_away()
            return accepted

    async def flush(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            await self._done()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            with self._sending:
                await trio.lowlevel.checkpoint()
                self._check()
                if self._part:
                    self._put_away()
                await self._done()
                self._submit(self._commit_all)
                await self._done()
        except trio.Cancelled:
            self.abort()
            with trio.move_on_after(_THREAD_GRACE, shield=True):
                await self._over.wait()
            if not self._committed:
                raise
        finally:
            self.abort()

    def abort(self) -> None:
        self._closed = True
        self._scope.cancel()
        self._changed.unpark_all()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")
        if self._failure is not None:
            raise ChannelBroken(str(self._failure)) from self._failure.__cause__

    def _put_away(self) -> None:
        self._submit(partial(self._put_part, self._parts, memoryview(self._part)))
        self._parts += 1
        self._part = bytearray()

    def _submit(self, job: Call) -> None:
        self._jobs.append(job)
        self._unfinished += 1
        self._changed.unpark_all()

    async def _done(self) -> None:
        while self._unfinished:
            await self._changed.park()
            self._check()

    async def _work(self) -> None:
        while True:
            while not self._jobs:
                await self._changed.park()
            failure = await failure_of(self._jobs.popleft())
            if failure is None:
                self._unfinished -= 1
            else:
                self._failure = self._failure or failure
                self._scope.cancel()  # the others are of no use any more
            self._changed.unpark_all()

    async def _put_part(self, number: int, data: memoryview) -> None:
        with _saying(f"can't put part {number} into {self.peer}"):
            await self._put(number, data)

    async def _commit_all(self) -> None:
        with _saying(f"can't commit {self.peer}"):
            await self._commit(self._parts)
        self._committed = True


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Whatever leaves this block is a `ChannelBroken` that says ``what`` failed, and keeps the cause."""
    try:
        yield
    except (TransportError, KeyboardInterrupt, trio.Cancelled):
        raise
    except BaseException as problem:
        raise ChannelBroken(f"{what}: {words(problem)}") from problem
