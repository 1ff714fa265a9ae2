"""A transport that breaks the contract in one way, at one point of a migration, and keeps it otherwise."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast

import trio

from kvmmig.testing.memory import MemoryTransport
from kvmmig.transport import (
    Channel,
    Listener,
    PassingChannel,
    ReceiveChannel,
    SendChannel,
    Side,
    Transport,
    TransportURI,
)


class Misbehaviour(enum.StrEnum):
    """How the contract is broken."""

    LARGE_COUNT = "too large a count"
    NO_COUNT = "None is returned"
    VALUE_ERROR = "ValueError"
    SYSTEM_EXIT = "SystemExit"
    GROUP = "exception group"
    HANGS = "never returns"  # before it is cancelled
    HANGS_SHIELDED = "never returns, shielded"
    NO_CHECKPOINT = "no checkpoint"  # again and again
    ABORT_RAISES = "abort raises when cancelled"


#: With these, what is called is really done first; with the others it is not done at all.
DONE = frozenset(
    {
        Misbehaviour.LARGE_COUNT,
        Misbehaviour.NO_COUNT,
        Misbehaviour.SYSTEM_EXIT,
        Misbehaviour.HANGS_SHIELDED,
    }
)


#: These happen in each call from then on, as long as the migration is at that point.
_AGAIN = frozenset({Misbehaviour.HANGS, Misbehaviour.NO_CHECKPOINT})


class Point(enum.StrEnum):
    """Where in a migration it happens."""

    LISTEN = "listen"
    CONNECT = "connect"
    HELLO = "hello"
    FIRST = "first round"
    LATER = "later round"
    FINAL = "final pass"
    COMMIT = "commit"
    GO = "go"
    ANSWER = "after go"
    CLOSE = "close"


class Way(enum.StrEnum):
    """What kind of channel it is."""

    TWO_WAY = "two-way"
    ONE_WAY = "one-way"
    STORED = "stored"


_ROUNDS = dict.fromkeys((Point.HELLO, Point.FIRST, Point.LATER, Point.FINAL), "send_some")
_RECEIVED = dict.fromkeys(_ROUNDS, "receive_some")
_LISTENS = {Point.LISTEN: "listen", Point.CONNECT: "accept"}

#: The call that misbehaves at each point. What is not in it is not called there.
CALLS: dict[tuple[Way, Side], dict[Point, str]] = {
    (Way.TWO_WAY, Side.SOURCE): {
        Point.CONNECT: "connect",
        **_ROUNDS,
        Point.COMMIT: "receive_some",
        Point.GO: "send_some",
        Point.ANSWER: "receive_some",
        Point.CLOSE: "abort",
    },
    (Way.ONE_WAY, Side.SOURCE): {
        Point.CONNECT: "connect",
        **_ROUNDS,
        Point.COMMIT: "flush",
        Point.GO: "send_some",
        Point.ANSWER: "flush",
        Point.CLOSE: "aclose",
    },
    (Way.STORED, Side.SOURCE): {
        Point.CONNECT: "connect",
        **_ROUNDS,
        Point.GO: "send_some",
        Point.ANSWER: "flush",
        Point.CLOSE: "aclose",
    },
    (Way.TWO_WAY, Side.DESTINATION): {
        **_LISTENS,
        **_RECEIVED,
        Point.COMMIT: "send_some",
        Point.GO: "receive_some",
        Point.ANSWER: "send_some",
        Point.CLOSE: "aclose",
    },
    (Way.ONE_WAY, Side.DESTINATION): {
        **_LISTENS,
        **_RECEIVED,
        Point.GO: "receive_some",
        Point.CLOSE: "aclose",
    },
}

#: Which of a destination's words is sent at a point.
_WORDS = {Point.COMMIT: 2, Point.ANSWER: 3}


@dataclass
class Plan:
    """What happens where. ``point`` asks the source's migration where it is; ``cancel`` cancels it."""

    way: Way
    side: Side
    misbehaviour: Misbehaviour | None = None
    at: Point | None = None
    point: Callable[[], Point | None] = lambda: None
    cancel: Callable[[], None] = lambda: None
    #: When it has misbehaved first, by `time.perf_counter`.
    began: float | None = None
    #: Ends what can't be cancelled.
    released: trio.Event = field(default_factory=trio.Event)
    _sent: int = 0
    _received: int = 0

    def due(self, call: str) -> bool:
        """Whether this very call is to misbehave."""
        self._sent += call == "send_some"
        self._received += call == "receive_some"
        if self.at is None or CALLS[self.way, self.side].get(self.at) != call:
            return False
        if self.began and self.misbehaviour not in _AGAIN:
            return False
        if self.at in (Point.LISTEN, Point.CONNECT, Point.CLOSE):
            return True
        if self.side is Side.DESTINATION and call == "send_some":
            return self._sent == _WORDS[self.at]
        if self.at is Point.HELLO:  # a line that delays it brings it when the migration is further on
            calls = self._sent if call == "send_some" else self._received
            return calls == 1 or (self.began is not None and self.point() is Point.HELLO)
        now = self.point()
        if now is Point.COMMIT and self.way is Way.STORED:
            now = Point.GO if call == "send_some" else Point.ANSWER
        if now is Point.GO and self.side is Side.SOURCE and call != "send_some":
            now = Point.ANSWER
        return now is self.at

    def _begin(self) -> None:
        if self.began is None:
            self.began = perf_counter()

    async def misbehave(self, call: Callable[[], Awaitable[Any]], offered: int = 0) -> Any:
        """Do so instead of a call that may take or give ``offered`` bytes."""
        result = await call() if self.misbehaviour in DONE else None  # a cancelled call has done nothing
        self._begin()
        match self.misbehaviour:
            case Misbehaviour.LARGE_COUNT:
                return offered + 1
            case Misbehaviour.NO_COUNT:
                return None
            case Misbehaviour.VALUE_ERROR:
                raise ValueError("a bug")
            case Misbehaviour.SYSTEM_EXIT:
                raise SystemExit(3)
            case Misbehaviour.GROUP:
                raise ExceptionGroup("two bugs", [ValueError("one"), RuntimeError("two")])
            case Misbehaviour.HANGS:
                await trio.sleep_forever()
            case Misbehaviour.HANGS_SHIELDED:
                with trio.CancelScope(shield=True):
                    await self.released.wait()
                return result
            case Misbehaviour.NO_CHECKPOINT:
                return 1
        self.cancel()
        return await call()

    def misbehave_in_abort(self) -> None:
        """Do so in an abort, which can't wait."""
        self._begin()
        match self.misbehaviour:
            case Misbehaviour.SYSTEM_EXIT:
                raise SystemExit(3)
            case Misbehaviour.GROUP:
                raise ExceptionGroup("two bugs", [ValueError("one"), RuntimeError("two")])
        raise ValueError("a bug")


_CAPACITY = 1 << 20  # bytes: far less than a final pass has, and enough for a busy event loop


class RogueTransport(Transport):
    """Between two tasks of this process; where it stores, to nowhere."""

    def __init__(self, target: str, plan: Plan) -> None:
        super().__init__(TransportURI("rogue", target))
        self.stores = plan.way is Way.STORED
        self._plan = plan
        self._memory = MemoryTransport(TransportURI("memory", target, {"capacity": str(_CAPACITY)}))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        await self._enter("connect")
        if self.stores:
            yield self._or_nothing(RogueChannel(_Nowhere(), self._plan), "connect")
            return
        async with self._memory.connect() as channel:
            yield self._or_nothing(RogueChannel(channel, self._plan), "connect")

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await self._enter("listen")
        async with self._memory.listen() as listener:
            yield self._or_nothing(_RogueListener(listener, self), "listen")

    async def _enter(self, call: str) -> None:
        plan = self._plan
        if plan.due(call) and plan.misbehaviour is not Misbehaviour.NO_COUNT:
            await plan.misbehave(trio.lowlevel.checkpoint)

    def _or_nothing(self, thing: Any, call: str) -> Any:
        if self._plan.due(call):
            self._plan._begin()
            return None
        return thing


class _RogueListener(Listener):
    def __init__(self, below: Listener, transport: RogueTransport) -> None:
        self.uri = transport.uri
        self._below = below
        self._transport = transport

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        transport = self._transport
        async with self._below.accept() as channel:
            await transport._enter("accept")
            yield transport._or_nothing(RogueChannel(channel, transport._plan), "accept")


class RogueChannel(PassingChannel):
    """Keeps the contract but where the plan says otherwise."""

    def __init__(self, below: SendChannel | ReceiveChannel, plan: Plan) -> None:
        super().__init__(below)
        self._plan = plan

    @property
    def two_way(self) -> bool:
        return self._plan.way is Way.TWO_WAY

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        if self._plan.due("send_some"):
            offered = sum(len(buffer) for buffer in buffers)
            return cast(int, await self._plan.misbehave(lambda: self.below.send_some(buffers), offered))
        return await self.below.send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        """What arrives says where the migration is, so it always has been received."""
        count = await self.below.receive_some(buffer)
        if not self._plan.due("receive_some"):
            return count

        async def received() -> int:
            await trio.lowlevel.checkpoint()
            return count

        return cast(int, await self._plan.misbehave(received, len(buffer)))

    async def flush(self) -> None:
        if self._plan.due("flush"):
            await self._plan.misbehave(self.below.flush)
        else:
            await self.below.flush()

    async def aclose(self) -> None:
        if self._plan.due("aclose"):
            await self._plan.misbehave(self.below.aclose)
        else:
            await self.below.aclose()

    def abort(self) -> None:
        self.below.abort()
        plan = self._plan
        if plan.due("abort") or (plan.began and plan.misbehaviour is Misbehaviour.ABORT_RAISES):
            plan.misbehave_in_abort()


class _Nowhere(Channel):
    """Takes everything, and gives nothing."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        return len(buffers[0])

    async def receive_some(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        return 0

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        return
