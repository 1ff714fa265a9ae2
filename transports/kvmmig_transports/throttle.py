"""``throttle+TRANSPORT?throttle.rate=50MB/s&throttle.latency=20ms&throttle.jitter=5ms``: a slower way.

The rate is a bound on what is accepted: a sender waits before any byte of the next call is. Latency and
jitter are a line in which bytes stand until their time has come; it keeps their order and is bounded, as the
window of a real link is. Each direction has its own.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, KnobError, TransportError
from kvmmig.transport import (
    AnyChannel,
    Knob,
    Option,
    PassingChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
)
from kvmmig.transport.toolkit import Interrupts, OneAtATime, TokenBucket, own_tasks, prefix
from kvmmig.units import format_duration, format_rate, parse_duration, parse_rate

_MOST_BYTES = 1 << 20  # copied in one call
_SMALLEST_LINE = 1 << 20
_LINE_WITHOUT_RATE = 64 << 20
_ALL = 1 << 62


class ThrottleWrapper(Wrapper):
    """Slows down both directions of a transport."""

    summary = "slows a transport down, as a link that is narrow or long would"
    syntax = "throttle+TRANSPORT:...[?throttle.rate=50MB/s&throttle.latency=20ms&throttle.jitter=5ms]"
    options = (
        Option("rate", "the most bytes a second in each direction, such as 50MB/s; without it, no limit"),
        Option("latency", "how much later each byte arrives, such as 20ms", "0"),
        Option("jitter", "how much later still, at random, at the most", "0"),
    )

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        try:
            self._rate = parse_rate(self.option("rate")) if self.option("rate") else None
            self._latency = parse_duration(self.option("latency"))
            self._jitter = parse_duration(self.option("jitter"))
        except ValueError as error:
            raise BadURI(f"{str(uri)!r}: {error}") from error

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        async with AsyncExitStack() as stack:
            if self._latency or self._jitter:
                most = _LINE_WITHOUT_RATE
                if self._rate is not None:
                    most = max(_SMALLEST_LINE, int(self._rate * (self._latency + self._jitter)))
                tasks = await stack.enter_async_context(own_tasks())
                channel = DelayedChannel(channel, self._latency, self._jitter, most, tasks)
            yield await stack.enter_async_context(LimitedChannel(channel, self._rate))


class LimitedChannel(PassingChannel):
    """Lets ``rate`` bytes a second through, in each direction; all where it is None. A knob turns it."""

    def __init__(self, below: AnyChannel, rate: float | None) -> None:
        super().__init__(below)
        self.knobs = {**below.knobs, "throttle.rate": Knob(self._rate, self._turn_rate)}
        self._out, self._in = TokenBucket(rate), TokenBucket(rate)
        self._sending, self._receiving = OneAtATime("sending"), OneAtATime("receiving")
        self._interrupts = Interrupts()
        self._closed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            return await self._move(self._out, lambda most: self.below.send_some(prefix(buffers, most)))

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            return await self._move(self._in, lambda most: self.below.receive_some(buffer[:most]))

    async def flush(self) -> None:
        await super().flush()
        self._out.begin()  # what is sent next comes after a pause, which is no credit for it

    def abort(self) -> None:
        self._closed = True
        self._interrupts.now()
        super().abort()

    def _rate(self) -> str:
        return "none" if self._out.rate is None else format_rate(self._out.rate)

    def _turn_rate(self, value: str) -> None:
        try:
            rate = None if value == "none" else parse_rate(value)
        except ValueError as error:
            raise KnobError(f"throttle.rate: {error}; none is no limit") from error
        self._out.rate = self._in.rate = rate
        self._interrupts.now()  # who waits looks again

    async def _move(self, bucket: TokenBucket, move: Callable[[int], Awaitable[int]]) -> int:
        while (allowed := bucket.allowed()) == 0 and not self._closed:
            with self._interrupts.allowed():
                await bucket.wait()
        count = await move(_ALL if allowed is None else allowed or 1)
        bucket.spend(count)
        return count


class _Line:
    """What is on its way in one direction: bytes, then perhaps an end (no bytes) or an error."""

    def __init__(self, latency: float, jitter: float, most: int, seed: int) -> None:
        self.items: deque[tuple[float, memoryview | BaseException]] = deque()
        self.size = 0
        self.changed = trio.lowlevel.ParkingLot()
        self.latency = latency
        self.jitter = jitter
        self._most = most
        self._chance = random.Random(seed)  # the same waits in each run

    @property
    def room(self) -> int:
        return self._most - self.size

    def put(self, item: memoryview | BaseException) -> None:
        due = trio.current_time() + self.latency + self._chance.uniform(0, self.jitter)
        self.items.append((due, item))  # one that is due earlier waits for those before it
        if isinstance(item, memoryview):
            self.size += len(item)
        self.changed.unpark_all()

    def take(self, count: int) -> None:
        """So many bytes of the first item have arrived."""
        due, item = self.items.popleft()
        assert isinstance(item, memoryview)
        if count < len(item):
            self.items.appendleft((due, item[count:]))
        self.size -= count
        self.changed.unpark_all()


class DelayedChannel(PassingChannel):
    """Delivers everything later. Two tasks carry the bytes; they end with the channel.

    An error on the way, of whatever class, is raised by the next call of the sender, and for the receiver
    when its time has come.
    """

    def __init__(
        self, below: AnyChannel, latency: float, jitter: float, most: int, tasks: trio.Nursery
    ) -> None:
        """At most ``most`` bytes are on their way in each direction; the carriers live in ``tasks``."""
        super().__init__(below)
        self.copies = True
        self.call_size = _MOST_BYTES
        self.knobs = {
            **below.knobs,
            "throttle.latency": Knob(
                lambda: format_duration(self._out.latency), partial(self._turn, "latency")
            ),
            "throttle.jitter": Knob(lambda: format_duration(self._out.jitter), partial(self._turn, "jitter")),
        }
        self._tasks = tasks
        self._out, self._in = _Line(latency, jitter, most, 1), _Line(latency, jitter, most, 2)
        self._sending, self._receiving = OneAtATime("sending"), OneAtATime("receiving")
        self._interrupts = Interrupts()
        self._closed = False
        self._error: BaseException | None = None
        self._carriers: dict[Callable[[], Awaitable[None]], trio.CancelScope] = {}

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        line = self._out
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            while line.room <= 0:
                await line.changed.park()
                self._check()
            data = b"".join(prefix(buffers, min(line.room, _MOST_BYTES)))
            line.put(memoryview(data))
            self._have(self._carry_out)
            return len(data)

    async def receive_some(self, buffer: memoryview) -> int:
        line = self._in
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            self._have(self._carry_in)
            while not line.items:
                await line.changed.park()
                self._check_open()
            due, item = line.items[0]
            with self._interrupts.allowed():
                await trio.sleep_until(due)
            self._check_open()
            if isinstance(item, BaseException):
                raise _broken(item) from item
            if not item:
                return 0
            count = min(len(buffer), len(item))
            buffer[:count] = item[:count]
            line.take(count)
            return count

    async def flush(self) -> None:
        """Waits until the line is empty, and then as below."""
        await self._emptied()
        await self.below.flush()

    def waits_for(self) -> str:
        """Who waits for an answer to what never went out should know."""
        return str(_broken(self._error)) if self._error else self.below.waits_for()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            for scope in self._carriers.values():
                scope.cancel()
            self._interrupts.now()
            for line in (self._out, self._in):
                line.changed.unpark_all()
        self.below.abort()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._emptied()
            await self.below.aclose()
        finally:
            self.abort()

    async def _emptied(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        while self._out.items:
            await self._out.changed.park()
            self._check()

    def _turn(self, name: str, value: str) -> None:
        """Holds for what is put on the line from now on."""
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            raise KnobError(f"throttle.{name}: {error}") from error
        for line in (self._out, self._in):
            setattr(line, name, seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side")

    def _check(self) -> None:
        self._check_open()
        if self._error:
            raise _broken(self._error) from self._error

    def _have(self, carry: Callable[[], Awaitable[None]]) -> None:
        """Start a carrier, once, when it is first needed: a file that is written must not be read."""
        if carry not in self._carriers:
            self._carriers[carry] = trio.CancelScope()
            self._tasks.start_soon(self._run, carry)

    async def _run(self, carry: Callable[[], Awaitable[None]]) -> None:
        with self._carriers[carry]:
            await carry()

    async def _carry_out(self) -> None:
        line = self._out
        try:
            while True:
                while not line.items:
                    await line.changed.park()
                due, item = line.items[0]
                assert isinstance(item, memoryview)
                await trio.sleep_until(due)
                line.take(await self.below.send_some([item]))
        except BaseException as error:
            _pass_cancels(error)
            self._error = error
            line.changed.unpark_all()
            self._in.put(error)  # who only waits for an answer is to know that none will come

    async def _carry_in(self) -> None:
        line = self._in
        buffer = memoryview(bytearray(_MOST_BYTES))
        try:
            while True:
                while line.room <= 0:
                    await line.changed.park()
                count = await self.below.receive_some(buffer[: line.room])
                line.put(memoryview(bytes(buffer[:count])))
                if count == 0:
                    return
        except BaseException as error:
            _pass_cancels(error)
            line.put(error)


def _pass_cancels(error: BaseException) -> None:
    """The end of a carrier, and a person's Ctrl-C, are no errors of the channel below.

    An error of that channel, which may come when the carrier is about to end, is one all the same.
    """
    ends = trio.current_effective_deadline() == -math.inf and not isinstance(error, Exception)
    if ends or isinstance(error, KeyboardInterrupt):
        raise error


def _broken(error: BaseException) -> ChannelBroken:
    return ChannelBroken(
        str(error) if isinstance(error, TransportError) else f"{type(error).__name__}: {error}"
    )
