"""Wrappers: transports around a transport, named before it: ``throttle+tcp:...``."""

from __future__ import annotations

import enum
import logging
import math
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import ClassVar, cast

import trio

from kvmmig.errors import ConnectFailed, TransportError
from kvmmig.transport.boundedlog import BoundedLog
from kvmmig.transport.contract import (
    AnyChannel,
    Channel,
    Listener,
    ReceiveChannel,
    SendChannel,
    Transport,
)
from kvmmig.transport.guard import GuardedChannel, blaming, culprit
from kvmmig.transport.uri import TransportURI

_log = logging.getLogger("kvmmig.transport")
#: Handshakes of clients that go on at the same time.
_MOST_HANDSHAKES = 16


class Side(enum.Enum):
    """Which end of a channel one is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Wrapper(Transport):
    """A transport around a transport: it wraps channels. It stores, and arrives at once, as what it wraps.

    A client whose handshake fails, or takes longer than ``handshake_timeout``, is passed over: the listener
    goes on listening. Several may shake hands at a time; of too many the slowest makes room.
    """

    #: Seconds that entering `wrap` may take.
    handshake_timeout: ClassVar[float] = 10.0

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        """Check this wrapper's options, the first of ``uri``. ``inner`` is what the rest of it names."""
        self.uri = uri
        self.inner = inner
        self.stores = inner.stores
        self.arrives_at_once = inner.arrives_at_once
        self.starts_programs = self.starts_programs or inner.starts_programs
        self._given = self._take_options(uri.wrappers[0], uri.unwrapped()[0])
        self._shaking = _Shaking()

    @abstractmethod
    def wrap(self, channel: AnyChannel, *, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
        """A channel around ``channel``, for the block, in which it may own tasks.

        Entering it is the place for a handshake. Raises `ConnectFailed`, or what ``channel`` raises; a cancel
        leaves nothing. ``channel`` is ended by whoever calls this.
        """

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with AsyncExitStack() as stack:
            with blaming(culprit(self.inner), "connect", ConnectFailed):
                channel = await stack.enter_async_context(self.inner.connect())
            yield cast(SendChannel, await stack.enter_async_context(self._wrapped(channel, Side.SOURCE)))

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with AsyncExitStack() as stack:
            with blaming(culprit(self.inner), "listen", ConnectFailed):
                listener = await stack.enter_async_context(self.inner.listen())
            if not isinstance(listener, Listener):
                raise ConnectFailed(
                    f"{culprit(self.inner)} gave a {type(listener).__name__} where a listener is due"
                )
            yield _WrappedListener(listener, self)

    @asynccontextmanager
    async def _wrapped(self, channel: AnyChannel, side: Side) -> AsyncIterator[AnyChannel]:
        below = GuardedChannel(channel, culprit(self.inner))
        with trio.CancelScope(deadline=trio.current_time() + self.handshake_timeout) as scope:
            if side is Side.DESTINATION:
                self._shaking.begin(scope)
            async with self.wrap(below, side=side) as wrapped:
                if not isinstance(wrapped, AnyChannel):
                    raise ConnectFailed(
                        f"{culprit(self)} gave a {type(wrapped).__name__} from wrap where a channel is due"
                    )
                wrapped.wraps = below
                wrapped.identity = wrapped.identity or below.identity
                wrapped.proved = wrapped.proved or below.proved
                scope.deadline = math.inf
                self._shaking.end(scope)
                yield wrapped
        self._shaking.end(scope)
        if scope.cancelled_caught:
            bound = f"{self.handshake_timeout:g} s" if scope.deadline > 0 else "the time that others left it"
            raise ConnectFailed(
                f"{channel.peer} did not finish the handshake of {self.uri.wrappers[0]}+ within {bound}"
            )


class _Shaking:
    """The handshakes with clients that go on; a new one ends the oldest where there are too many."""

    def __init__(self) -> None:
        self._scopes: list[trio.CancelScope] = []

    def begin(self, scope: trio.CancelScope) -> None:
        self._scopes.append(scope)
        if len(self._scopes) > _MOST_HANDSHAKES:
            self._scopes.pop(0).deadline = -math.inf

    def end(self, scope: trio.CancelScope) -> None:
        with suppress(ValueError):
            self._scopes.remove(scope)


class _WrappedListener(Listener):
    """Says where the inner one listens: the other side need not have the same wrapper."""

    several = True

    def __init__(self, inner: Listener, wrapper: Wrapper) -> None:
        self.uri = inner.uri
        self._inner = inner
        self._wrapper = wrapper
        self._warnings = BoundedLog(_log)
        # One client's handshake must not hold up another's, and the inner listener may take one task only.
        self._turn = nullcontext() if inner.several else trio.Lock()

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        while True:
            accepted = shaken = False
            try:
                async with AsyncExitStack() as stack:
                    async with self._turn:
                        channel = await stack.enter_async_context(self._inner.accept())
                    accepted = True
                    with blaming(culprit(self._wrapper), "wrap", ConnectFailed):
                        async with self._wrapper._wrapped(channel, Side.DESTINATION) as wrapped:
                            shaken = True
                            yield cast(ReceiveChannel, wrapped)
                            return
            except TransportError as error:
                if not accepted or shaken or self._wrapper.arrives_at_once:
                    raise
                self._warnings.warn(f"a client was passed over: {error}")


class PassingChannel(Channel):
    """Does what the channel below it does: the base of a wrapper's channel, which changes what it likes.

    It goes the ways that ``below`` goes: of one that only sends, only `send_some` and `flush` are called.
    """

    def __init__(self, below: AnyChannel) -> None:
        self.below = cast(Channel, below)  # whichever of its ways there is
        self.peer = below.peer
        self.notices = below.notices
        self.binding = below.binding
        self.identity = below.identity
        self.proved = below.proved
        self.knobs = dict(below.knobs)
        if isinstance(below, SendChannel):
            self.copies = below.copies
            self.call_size = below.call_size

    @property
    def two_way(self) -> bool:
        return self.below.two_way

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await self.below.send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        return await self.below.receive_some(buffer)

    async def flush(self) -> None:
        await self.below.flush()

    def abort(self) -> None:
        self.below.abort()

    async def aclose(self) -> None:
        await self.below.aclose()

    def waits_for(self) -> str:
        return self.below.waits_for()

    def counters(self) -> dict[str, float]:
        return dict(self.below.counters())
