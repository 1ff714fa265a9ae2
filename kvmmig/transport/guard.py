"""The guard: makes the contract true whatever a channel does.

It stands between the engine and every channel, and between a wrapper and what it wraps. A transport can break
its migration. It can't break the machine, the monitor, or the rule that one side runs:

- a count that is no count, and any exception that is no `TransportError`, become a `ChannelBroken` that names
  the transport, its package and the rule that it broke; the traceback goes to the log;
- a call that returns without a checkpoint gets one; one that does so again and again breaks its channel;
- a call that does not return when it is cancelled is noticed, and left behind.

What contexts do, and calls that never return, is in `kvmmig.transport.supervision`.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, KnobError, TransportError
from kvmmig.transport.contract import (
    AnyChannel,
    Channel,
    Knob,
    RandomAccessChannel,
    ReceiveChannel,
    SendChannel,
    Transport,
    find_knob,
)
from kvmmig.transport.peers import Peer

T = TypeVar("T")
_log = logging.getLogger("kvmmig.transport")

#: So many returns without a checkpoint, one after the other, are no accident.
_MOST_WITHOUT = 100
#: Seconds that a call, or a context, has for its end once it is cancelled. Then it is left behind.
GRACE = 2.0


def culprit(transport: Transport) -> str:
    """How a sentence calls a transport: ``the transport 'ws' (from kvmmig-extra 0.1)``."""
    kind, name = ("wrapper", transport.uri.wrappers[0]) if transport.uri.wrappers else ("transport", "")
    return f"the {kind} {name or transport.uri.scheme!r} ({transport.origin})"


@contextmanager
def blaming(
    who: str, call: str | Callable[[], str], kind: type[TransportError] = ChannelBroken
) -> Iterator[None]:
    """Whatever else than a `TransportError` leaves this block becomes a ``kind`` that names ``who``.

    A cancel that comes from outside passes, and so does the Ctrl-C of a person.
    """
    try:
        yield
    except TransportError:
        raise
    except BaseException as problem:
        error = _translated(problem, who, call if isinstance(call, str) else call(), kind)
        if error is problem:
            raise
        raise error from problem


def _translated(problem: BaseException, who: str, call: str, kind: type[TransportError]) -> BaseException:
    if isinstance(problem, KeyboardInterrupt) and _ctrl_c_raises():
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


def _ctrl_c_raises() -> bool:
    """Whether a `KeyboardInterrupt` may be a person's: Python's handler of SIGINT is in force, or trio's."""
    handler = signal.getsignal(signal.SIGINT)
    return handler is signal.default_int_handler or getattr(handler, "__module__", "").startswith("trio.")


class GuardedChannel(Channel):
    """What the engine sees of a channel: it keeps the contract, whatever ``channel`` does.

    It has all calls; of a channel that goes one way, or has random access, only its own may be used, and
    `two_way` is False.
    """

    def __init__(self, channel: AnyChannel, who: str) -> None:
        """``who`` is its transport's `culprit`. Raises `ChannelBroken` for what is no channel."""
        if not isinstance(channel, AnyChannel):
            raise ChannelBroken(f"{who} gave a {type(channel).__name__} where a channel is due")
        with blaming(who, "its attributes"):
            self.peer = str(channel.peer)
            self.notices = tuple(str(notice) for notice in channel.notices)
            self.binding = bytes(channel.binding)
            self.identity = channel.identity if isinstance(channel.identity, Peer) else None
            self.proved = channel.proved is True
            self._inner = channel.wraps if isinstance(channel.wraps, GuardedChannel) else None
            self._two_way = bool(channel.two_way)
            if isinstance(channel, ReceiveChannel) and channel.file is not None:
                self.file = int(channel.file)
            if isinstance(channel, SendChannel):
                self.copies = bool(channel.copies)
            if isinstance(channel, SendChannel | RandomAccessChannel):
                self.call_size = max(int(channel.call_size), 1)
        self._who = who
        self._channel = channel
        self._send = channel if isinstance(channel, SendChannel) else None
        self._receive = channel if isinstance(channel, ReceiveChannel) else None
        self._access = channel if isinstance(channel, RandomAccessChannel) else None
        self._turns = _turns()
        self._without = 0
        #: Seconds after which the engine cancels a `send_some`.
        self.send_bound = math.inf
        #: Set when the context that it lives in has been left.
        self.context_left: trio.Event | None = None
        self._sending_since = math.inf
        self._send_call = "send_some" if self._access is None else "write_some"
        self._due: dict[str, float] = {}  # other calls that are under way, and when they will be cancelled
        self._failure = ""
        self._closed = self._aborted = False

    @property
    def two_way(self) -> bool:
        return self._two_way

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        assert self._send is not None, "a channel that has no send_some"
        send = self._send.send_some
        return await self._offer("send_some", lambda: send(buffers), buffers)

    async def write_some(self, pieces: Sequence[tuple[int, memoryview]]) -> int:
        """As `RandomAccessChannel.write_some`, for a channel that is one."""
        assert self._access is not None, "a channel without random access"
        write = self._access.write_some
        return await self._offer("write_some", lambda: write(pieces), [data for _, data in pieces], 4096)

    async def _offer(
        self, call: str, offer: Callable[[], Awaitable[int]], buffers: Sequence[memoryview], unit: int = 1
    ) -> int:
        self._check()
        turns, before = self._turns.count, self._sending_since
        self._sending_since = trio.current_time()
        try:
            count = await offer()
        except BaseException as problem:
            await self._explained(problem)
            self._raise(problem, call)
        finally:
            self._sending_since = before
        if type(count) is not int or not 0 < count <= len(buffers[0]) or count % unit:
            offered = sum(len(buffer) for buffer in buffers)
            if type(count) is not int or not 0 < count <= offered or count % unit:
                raise self._broke(f"returned {count!r} from {call} where {offered} bytes were offered")
        if self._failure or turns == self._turns.count:
            await self._checkpoint(call)
        else:
            self._without = 0
        return count

    async def receive_some(self, buffer: memoryview) -> int:
        self._check()
        assert self._receive is not None, "a channel that only sends"
        turns = self._turns.count
        try:
            count = await self._receive.receive_some(buffer)
        except BaseException as problem:
            await self._explained(problem)
            self._raise(problem, "receive_some")
        if type(count) is not int or not 0 <= count <= len(buffer):
            raise self._broke(f"returned {count!r} from receive_some into a buffer of {len(buffer)} bytes")
        if self._failure or turns == self._turns.count:
            await self._checkpoint("receive_some")
        else:
            self._without = 0
        return count

    async def flush(self) -> None:
        self._check()
        channel = self._send or self._access
        assert channel is not None, "a channel that only receives"
        await self._call("flush", channel.flush)

    async def settle(self) -> None:
        """As `RandomAccessChannel.settle`, for a channel that is one."""
        self._check()
        assert self._access is not None, "a channel without random access"
        await self._call("settle", self._access.settle)

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
        """A sentence about a call that was cancelled `GRACE` ago and has not ended; else empty.

        It names the innermost channel that is inside a call: a wrapper only waits for what it wraps.
        """
        late = any(due + GRACE < trio.current_time() for due in self._due.values())
        if not late and self._sending_since + self.send_bound + GRACE >= trio.current_time():
            return ""
        inside: GuardedChannel = self
        while inside._inner is not None and inside._inner._calls:
            inside = inside._inner
        return f"{inside._who} did not return from {inside._calls[0]} {GRACE:g} s after it was cancelled"

    @property
    def _calls(self) -> list[str]:
        """Calls that are under way, those of a receiver not counted."""
        sending = [] if self._sending_since == math.inf else [self._send_call]
        return [*sorted(self._due, key=lambda name: self._due[name]), *sending]

    @property
    def is_broken_contract(self) -> bool:
        """It has broken a rule: what it says of what it did proves nothing."""
        return bool(self._failure)

    def fail(self, sentence: str) -> None:
        """Nothing more is expected of it: every call from now on, and when it comes back, raises this."""
        self._failure = self._failure or sentence

    def _check(self) -> None:
        if self._failure:
            raise ChannelBroken(self._failure)
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")

    async def _call(self, name: str, call: Callable[[], Awaitable[None]]) -> None:
        turns = self._turns.count
        self._due[name] = max(trio.current_effective_deadline(), trio.current_time())
        try:
            await call()
        except BaseException as problem:
            await self._explained(problem)
            self._raise(problem, name)
        finally:
            self._due.pop(name, None)
        if self._failure or turns == self._turns.count:
            await self._checkpoint(name)

    async def _checkpoint(self, call: str) -> None:
        """The call had none, so have one. A cancel must not come now: what was moved would be forgotten."""
        if self._failure:
            raise ChannelBroken(self._failure)
        self._without += 1
        if self._without > _MOST_WITHOUT:
            raise self._broke(f"returned from {call} {_MOST_WITHOUT} times without a checkpoint")
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _explained(self, problem: BaseException) -> None:
        """Where it was closed, and not by us, its context is failing: let that say why."""
        if isinstance(problem, ChannelClosed) and not self._closed and self.context_left is not None:
            with trio.move_on_after(GRACE, shield=True):
                await self.context_left.wait()

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
