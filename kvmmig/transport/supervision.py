"""Contexts and calls of a stranger's in tasks of their own, so that they can fail, or hang, by themselves.

`connected` and `listening` are how the engine gets channels; `supervised` is how it uses them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Generic, TypeVar

import trio

from kvmmig.errors import ChannelBroken, ConnectFailed, KvmmigError, TransportError
from kvmmig.transport import guard
from kvmmig.transport.contract import (
    AnyChannel,
    Listener,
    RandomAccessChannel,
    ReceiveChannel,
    SendChannel,
    Transport,
)
from kvmmig.transport.guard import GuardedChannel, blaming, culprit
from kvmmig.transport.uri import TransportURI

T = TypeVar("T")
_log = logging.getLogger("kvmmig.transport")

_LOOK_EVERY = 0.25  # seconds


class _Hosted(Generic[T]):
    """A context that a task of its own enters and leaves."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]], who: str, call: str) -> None:
        self._make = make
        self._who = who
        self._call = call
        # Only who has entered it ends it: a cancel from outside must leave it time for last words.
        self._scope = trio.CancelScope(shield=True)
        self._entered, self._leave, self.left = trio.Event(), trio.Event(), trio.Event()
        self._thing: list[T] = []
        self._failure: BaseException | None = None
        #: Called with a sentence when the context fails by itself while it is in use.
        self.on_failure: Callable[[str], None] = lambda sentence: None

    async def run(self) -> None:
        try:
            with self._scope:
                with blaming(self._who, self._where, ConnectFailed):
                    async with self._make() as thing:
                        self._thing.append(thing)
                        self._entered.set()
                        await self._leave.wait()
                if not self._leave.is_set():
                    raise ConnectFailed(f"{self._who} left its context by itself")
        except TransportError as error:
            self._failure = error
            if self._thing:
                self.on_failure(str(error))
        finally:
            self.left.set()
            self._entered.set()

    def _where(self) -> str:
        return f"the block of {self._call}, or a task in it" if self._thing else self._call

    async def enter(self, nursery: trio.Nursery) -> T:
        """Raises what it fails with. A cancel is its cancel."""
        nursery.start_soon(self.run)
        try:
            await self._entered.wait()
        except trio.Cancelled:
            self._scope.cancel()
            await self._wait_left()
            raise
        if self._failure is not None:
            raise self._failure
        return self._thing[0]

    async def leave(self) -> None:
        """What it then fails with is an affair of the log: what counted has been said by `aclose`."""
        self._leave.set()
        await self._wait_left()
        if not self.left.is_set():
            self._scope.cancel()
            await self._wait_left()
        if not self.left.is_set():
            _log.error("%s does not leave %s; it is left behind", self._who, self._call)

    async def _wait_left(self) -> None:
        with trio.move_on_after(guard.GRACE, shield=True):
            await self.left.wait()


@asynccontextmanager
async def _hosted(
    make: Callable[[], AbstractAsyncContextManager[T]],
    who: str,
    call: str,
    kind: type,
    strays: trio.Nursery,
) -> AsyncIterator[tuple[T, _Hosted[T]]]:
    hosted = _Hosted(make, who, call)
    thing = await hosted.enter(strays)
    try:
        if not isinstance(thing, kind):
            raise ConnectFailed(
                f"{who} gave a {type(thing).__name__} from {call} where a {kind.__name__} is due"
            )
        yield thing, hosted
    finally:
        await hosted.leave()


@asynccontextmanager
async def _channel(
    make: Callable[[], AbstractAsyncContextManager[AnyChannel]],
    who: str,
    call: str,
    kind: type,
    strays: trio.Nursery,
) -> AsyncIterator[GuardedChannel]:
    async with _hosted(make, who, call, kind, strays) as (channel, hosted):
        guarded = GuardedChannel(channel, who)
        guarded.context_left = hosted.left

        def failed(sentence: str) -> None:
            guarded.fail(sentence)
            guarded.abort()  # wakes whoever is inside a call

        hosted.on_failure = failed
        try:
            yield guarded
        finally:
            guarded.abort()  # nothing, where it was ended before


@asynccontextmanager
async def connected(
    transport: Transport, strays: trio.Nursery, *, random_access: bool = False
) -> AsyncIterator[GuardedChannel]:
    """Connect; the block has the channel, guarded, and ends it: by `abort`, unless it was closed before.

    With ``random_access`` it is a `RandomAccessChannel`, which the transport must have. Its tasks live in
    ``strays``: one that does not end when it is told to stays there. Raises `ConnectFailed` and other
    `TransportError`.
    """
    who = culprit(transport)
    if random_access:
        made = _channel(
            transport.connect_random_access, who, "connect_random_access", RandomAccessChannel, strays
        )
    else:
        made = _channel(transport.connect, who, "connect", SendChannel, strays)
    async with made as channel:
        yield channel


class GuardedListener:
    """What the engine sees of a listener."""

    def __init__(self, listener: Listener, who: str, strays: trio.Nursery) -> None:
        with blaming(who, "its attributes", ConnectFailed):
            uri: object = listener.uri
            #: Several tasks may wait in `accept` at a time; else they take turns.
            self.several = listener.several is True
        if not isinstance(uri, TransportURI):
            raise ConnectFailed(f"{who} gave a listener whose uri is {uri!r}, and no TransportURI")
        #: Where it listens in fact.
        self.uri = uri
        self._listener = listener
        self._who = who
        self._strays = strays

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[GuardedChannel]:
        """As `Listener.accept`; the channel may outlive the listener's own block, and be left by any task."""
        async with _channel(
            self._listener.accept, self._who, "accept", ReceiveChannel, self._strays
        ) as channel:
            yield channel


@asynccontextmanager
async def listening(transport: Transport, strays: trio.Nursery) -> AsyncIterator[GuardedListener]:
    """Listen; the block has the listener, guarded. ``strays`` as for `connected`."""
    who = culprit(transport)
    async with _hosted(transport.listen, who, "listen", Listener, strays) as (listener, _):
        yield GuardedListener(listener, who, strays)


class _Work(Generic[T]):
    def __init__(self, call: Callable[[], Awaitable[T]]) -> None:
        self._call = call
        # Only who supervises it ends it, and so knows how it ended.
        self.scope = trio.CancelScope(shield=True)
        self.done = trio.Event()
        self.result: list[T] = []
        self.error: BaseException | None = None

    async def run(self) -> None:
        try:
            with self.scope:
                self.result.append(await self._call())
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


async def supervised(
    call: Callable[[], Awaitable[T]],
    strays: trio.Nursery,
    *,
    stuck: Callable[[], str] = lambda: "",
    overdue: Callable[[], KvmmigError | None] = lambda: None,
    patience: Callable[[], float] = lambda: 0.0,
) -> T:
    """Await ``call()``, which uses channels, in a task of its own: one that can't be ended is left behind.

    ``stuck`` is asked now and then, see `GuardedChannel.stuck`; where it says something, that is raised as a
    `ChannelBroken`. So is ``overdue``, and what it returns is raised.

    A cancel gives the call ``patience()`` seconds to come to its end by itself, and after that `guard.GRACE`
    seconds to be cancelled.
    """
    work = _Work(call)
    strays.start_soon(work.run)
    try:
        while not work.done.is_set():
            with trio.move_on_after(_LOOK_EVERY):
                await work.done.wait()
            if not work.done.is_set() and (sentence := stuck()):
                raise ChannelBroken(sentence)
            if not work.done.is_set() and (error := overdue()) is not None:
                raise error
    finally:
        if not work.done.is_set():
            with trio.move_on_after(patience(), shield=True):
                await work.done.wait()
            work.scope.cancel()
            with trio.move_on_after(guard.GRACE, shield=True):
                await work.done.wait()
            if not work.done.is_set():
                _log.error("a call that was cancelled %g s ago is left behind", guard.GRACE)
    if work.error is not None:
        raise work.error
    return work.result[0]
