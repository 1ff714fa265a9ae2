"""The guard: makes the contract true whatever a channel does.

It stands between the engine and every channel, and between a wrapper and what it wraps. A transport can break
its migration. It can't break the machine, the monitor, or the rule that one side runs:

- a count that is no count, and any exception that is no `TransportError`, become a `ChannelBroken` that names
  the transport, its package and the rule that it broke; the traceback goes to the log;
- a call that returns without a checkpoint gets one; one that does so again and again breaks its channel;
- contexts are entered and left by a task of their own, so what a channel's own tasks raise, or cancel, ends
  the channel and nobody else;
- a call that does not return when it is cancelled is left behind, see `stuck`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Generic, NoReturn, TypeVar

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed, KnobError, TransportError
from kvmmig.transport.contract import (
    AnyChannel,
    Channel,
    Knob,
    Listener,
    ReceiveChannel,
    SendChannel,
    Transport,
    find_knob,
)
from kvmmig.transport.uri import TransportURI

T = TypeVar("T")
_log = logging.getLogger("kvmmig.transport")

#: So many returns without a checkpoint, one after the other, are no accident.
_MOST_IN_A_ROW = 100
#: Seconds that a call, or a context, has for its end once it is cancelled. Then it is left behind.
GRACE = 2.0
_LOOK_EVERY = 0.25  # seconds


def culprit(transport: Transport) -> str:
    """How a sentence calls a transport: ``the transport 'ws' (from kvmmig-extra 0.1)``."""
    kind, name = ("wrapper", transport.uri.wrappers[0]) if transport.uri.wrappers else ("transport", "")
    return f"the {kind} {name or transport.uri.scheme!r} ({transport.origin})"


@contextmanager
def blaming(who: str, call: str, kind: type[TransportError] = ChannelBroken) -> Iterator[None]:
    """Whatever else than a `TransportError` leaves this block becomes a ``kind`` that names ``who``.

    A cancel that comes from outside passes, and so does the Ctrl-C of a person.
    """
    try:
        yield
    except TransportError:
        raise
    except BaseException as problem:
        error = _translated(problem, who, call, kind)
        if error is problem:
            raise
        raise error from problem


def _translated(problem: BaseException, who: str, call: str, kind: type[TransportError]) -> BaseException:
    if isinstance(problem, KeyboardInterrupt | GeneratorExit):
        return problem
    rest: BaseException | None = problem
    if isinstance(problem, BaseExceptionGroup):
        rest = problem.split(trio.Cancelled)[1]
        while isinstance(rest, BaseExceptionGroup) and len(rest.exceptions) == 1:
            rest = rest.exceptions[0]
        if isinstance(rest, TransportError):
            return rest
    elif isinstance(problem, trio.Cancelled):
        rest = None
    if rest is None and trio.current_effective_deadline() == -math.inf:
        return problem
    _log.error("%s failed in %s", who, call, exc_info=problem)
    if rest is None:
        return kind(f"{who} raised Cancelled from {call} where nobody had cancelled it")
    words = " ".join(f"{type(rest).__name__}: {rest}".split())
    return kind(f"{who} raised {words} from {call}; only a TransportError may come out of it")


class GuardedChannel(Channel):
    """What the engine sees of a channel: it keeps the contract, whatever ``channel`` does.

    It has both directions; of one that goes one way only that one may be used, and `two_way` is False.
    """

    def __init__(self, channel: AnyChannel, who: str) -> None:
        """``who`` is its transport's `culprit`."""
        with blaming(who, "its attributes"):
            self.peer = str(channel.peer)
            self.notices = tuple(str(notice) for notice in channel.notices)
            self._two_way = bool(channel.two_way)
            if isinstance(channel, SendChannel):
                self.copies = bool(channel.copies)
                self.call_size = max(int(channel.call_size), 1)
        self._who = who
        self._channel = channel
        self._send = channel if isinstance(channel, SendChannel) else None
        self._receive = channel if isinstance(channel, ReceiveChannel) else None
        self._turns = _turns()
        self._seen = -1
        self._in_a_row = 0
        #: Calls that are under way, and when each must have been cancelled. Two tasks may make the same.
        self._due: list[tuple[str, float]] = []
        self._calls_end = math.inf
        self._failure = ""
        self._closed = self._aborted = False

    @property
    def two_way(self) -> bool:
        return self._two_way

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        self._check()
        assert self._send is not None, "a channel that only receives"
        due = self._begin("send_some")
        try:
            count = await self._send.send_some(buffers)
        except BaseException as problem:
            self._raise(problem, "send_some")
        finally:
            self._due.remove(due)
        if type(count) is not int or not 0 < count <= len(buffers[0]):
            offered = sum(len(buffer) for buffer in buffers)
            if type(count) is not int or not 0 < count <= offered:
                raise self._broke(f"returned {count!r} from send_some where {offered} bytes were offered")
        await self._checkpoint("send_some")
        return count

    async def receive_some(self, buffer: memoryview) -> int:
        self._check()
        assert self._receive is not None, "a channel that only sends"
        due = self._begin("receive_some")
        try:
            count = await self._receive.receive_some(buffer)
        except BaseException as problem:
            self._raise(problem, "receive_some")
        finally:
            self._due.remove(due)
        if type(count) is not int or not 0 <= count <= len(buffer):
            raise self._broke(f"returned {count!r} from receive_some into a buffer of {len(buffer)} bytes")
        await self._checkpoint("receive_some")
        return count

    async def flush(self) -> None:
        self._check()
        assert self._send is not None, "a channel that only receives"
        await self._call("flush", self._send.flush)

    async def aclose(self) -> None:
        if self._failure:
            self.abort()
            raise ChannelBroken(self._failure)
        self._closed = True
        try:
            await self._call("aclose", self._channel.aclose)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        self._closed = True
        if self._aborted:
            return
        self._aborted = True
        try:
            self._channel.abort()
        except KeyboardInterrupt:
            raise
        except BaseException:
            _log.exception("%s failed in abort, which must never raise", self._who)

    def waits_for(self) -> str:
        try:
            return str(self._channel.waits_for())
        except BaseException:
            _log.exception("%s failed in waits_for, which must never raise", self._who)
            return ""

    def counters(self) -> Mapping[str, float]:
        try:
            return {str(name): float(value) for name, value in self._channel.counters().items()}
        except BaseException:
            _log.exception("%s failed in counters, which must never raise", self._who)
            return {}

    @property
    def knobs(self) -> Mapping[str, Knob]:  # type: ignore[override]  # what is below may change its own
        """Those of the channel, each of which raises nothing but `KnobError`."""
        try:
            knobs = dict(self._channel.knobs)
        except BaseException:
            _log.exception("%s failed in knobs, which must never raise", self._who)
            return {}
        return {str(name): self._guarded_knob(str(name), knob) for name, knob in knobs.items()}

    def turn(self, knob: str, value: str) -> None:
        """Turn one of `knobs`. Raises `KnobError` for an unknown one, or a value that makes no sense."""
        find_knob(self.knobs, knob).turn(value)

    def stuck(self) -> str:
        """A sentence about a call that was cancelled `GRACE` ago and has not ended; else empty."""
        late = trio.current_time() - GRACE
        for call, due in self._due:
            if min(due, self._calls_end) < late:
                return f"{self._who} did not return from {call} {GRACE:g} s after it was cancelled"
        return ""

    def expect_end(self) -> None:
        """Whoever is inside a call has just been cancelled, and not by a deadline: for `stuck`."""
        self._calls_end = min(self._calls_end, trio.current_time())

    def fail(self, sentence: str) -> None:
        """Nothing more is expected of it: every call from now on, and when it comes back, raises this."""
        self._failure = self._failure or sentence

    def _check(self) -> None:
        if self._failure:
            raise ChannelBroken(self._failure)
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")

    async def _call(self, name: str, call: Callable[[], Awaitable[None]]) -> None:
        due = self._begin(name)
        try:
            await call()
        except BaseException as problem:
            self._raise(problem, name)
        finally:
            self._due.remove(due)
        await self._checkpoint(name)

    def _begin(self, call: str) -> tuple[str, float]:
        now = trio.current_time()  # a deadline that is over already is noticed only now
        due = (call, max(trio.current_effective_deadline(), now))
        self._due.append(due)
        return due

    async def _checkpoint(self, call: str) -> None:
        """Have one, if the call had none. A cancel must not come now: what was moved would be forgotten."""
        if self._failure:
            raise ChannelBroken(self._failure)
        if self._turns.count != self._seen:
            self._seen, self._in_a_row = self._turns.count, 0
            return
        self._in_a_row += 1
        if self._in_a_row > _MOST_IN_A_ROW:
            raise self._broke(f"returned from {call} {_MOST_IN_A_ROW} times without a checkpoint")
        await trio.lowlevel.cancel_shielded_checkpoint()
        self._seen = self._turns.count

    def _raise(self, problem: BaseException, call: str) -> NoReturn:
        error = problem
        if not isinstance(problem, TransportError):
            error = _translated(problem, self._who, call, ChannelBroken)
            if error is problem:
                raise problem
        if self._failure:  # its context has failed, which explains more
            raise ChannelBroken(self._failure) from problem
        if error is problem:
            raise problem
        self.fail(str(error))
        raise error from problem

    def _broke(self, what: str) -> ChannelBroken:
        self.fail(f"{self._who} {what}")
        _log.error(self._failure)
        return ChannelBroken(self._failure)

    def _guarded_knob(self, name: str, knob: Knob) -> Knob:
        def value() -> str:
            try:
                return str(knob.value())
            except BaseException:
                _log.exception("%s failed to say how its knob %s stands", self._who, name)
                return "?"

        def turn(text: str) -> None:
            with blaming(self._who, f"turning {name}", KnobError):
                knob.turn(text)

        return Knob(value, turn)


class _Turns(trio.abc.Instrument):
    """Counts the turns of the event loop: a call during which there was none was no checkpoint."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


_turns_of_this_run: trio.lowlevel.RunVar[_Turns] = trio.lowlevel.RunVar("turns")


def _turns() -> _Turns:
    try:
        return _turns_of_this_run.get()
    except LookupError:
        turns = _Turns()
        _turns_of_this_run.set(turns)
        trio.lowlevel.add_instrument(turns)
        return turns


class _Hosted(Generic[T]):
    """A context that a task of its own enters and leaves."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[T]], who: str, call: str) -> None:
        self._make = make
        self._who = who
        self._call = call
        self._scope = trio.CancelScope()
        self._entered, self._leave, self._left = trio.Event(), trio.Event(), trio.Event()
        self._thing: list[T] = []
        self._failure: BaseException | None = None
        #: Called with a sentence when the context fails by itself while it is in use.
        self.on_failure: Callable[[str], None] = lambda sentence: None

    async def run(self) -> None:
        try:
            with self._scope:
                with blaming(self._who, self._call, ConnectFailed):
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
            self._left.set()
            self._entered.set()

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
        if not self._left.is_set():
            self._scope.cancel()
            await self._wait_left()
        if not self._left.is_set():
            _log.error("%s does not leave %s; it is left behind", self._who, self._call)

    async def _wait_left(self) -> None:
        with trio.move_on_after(GRACE, shield=True):
            await self._left.wait()


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
    kind: type[AnyChannel],
    strays: trio.Nursery,
) -> AsyncIterator[GuardedChannel]:
    async with _hosted(make, who, call, kind, strays) as (channel, hosted):
        guarded = GuardedChannel(channel, who)

        def failed(sentence: str) -> None:
            guarded.fail(sentence)
            guarded.abort()  # wakes whoever is inside a call

        hosted.on_failure = failed
        try:
            yield guarded
        finally:
            guarded.abort()  # nothing, where it was ended before


@asynccontextmanager
async def connected(transport: Transport, strays: trio.Nursery) -> AsyncIterator[GuardedChannel]:
    """Connect; the block has the channel, guarded, and ends it: by `abort`, unless it was closed before.

    Its tasks live in ``strays``: one that does not end when it is told to stays there. Raises `ConnectFailed`
    and other `TransportError`.
    """
    async with _channel(transport.connect, culprit(transport), "connect", SendChannel, strays) as channel:
        yield channel


class GuardedListener:
    """What the engine sees of a listener."""

    def __init__(self, listener: Listener, who: str, strays: trio.Nursery) -> None:
        with blaming(who, "its attributes", ConnectFailed):
            uri = listener.uri
            #: Where it listens in fact.
            self.uri = uri if isinstance(uri, TransportURI) else TransportURI.parse(str(uri))
        self._listener = listener
        self._who = who
        self._strays = strays

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[GuardedChannel]:
        """As `Listener.accept`; the channel may outlive the listener's own block."""
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
    patience: Callable[[], float] = lambda: 0.0,
) -> T:
    """Await ``call()``, which uses channels, in a task of its own: one that can't be ended is left behind.

    ``stuck`` is asked now and then, see `GuardedChannel.stuck`; where it says something, that is raised as a
    `ChannelBroken`. A cancel gives the call ``patience()`` seconds to come to its end by itself, and after
    that `GRACE` seconds to be cancelled.
    """
    work = _Work(call)
    strays.start_soon(work.run)
    try:
        while not work.done.is_set():
            with trio.move_on_after(_LOOK_EVERY):
                await work.done.wait()
            if not work.done.is_set() and (sentence := stuck()):
                raise ChannelBroken(sentence)
    finally:
        if not work.done.is_set():
            with trio.move_on_after(patience(), shield=True):
                await work.done.wait()
            work.scope.cancel()
            with trio.move_on_after(GRACE, shield=True):
                await work.done.wait()
            if not work.done.is_set():
                _log.error("a call that was cancelled %g s ago is left behind", GRACE)
    if work.error is not None:
        raise work.error
    return work.result[0]
