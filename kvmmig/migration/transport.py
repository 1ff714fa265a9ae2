"""The transport contract: what a transport must promise, and nothing about how.

A *transport* is a cheap value made from a URI. It connects (the source's side) or listens (the
destination's side) and yields *channels*; a channel moves bytes. Everything here is about bytes: no
transport knows what a page, a round or a machine is. A *wrapper* is a transport around a transport.

The contract is small on purpose, and each sentence of it is tested by ``kvmmig.testing``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import parse_qsl

from kvmmig.errors import BadURI, ChannelBusy, KnobError

_SCHEME = re.compile(r"[a-z][a-z0-9.-]*")
_OPTIONS = re.compile(r"[a-z][a-z0-9._-]*=[^&]*(&[a-z][a-z0-9._-]*=[^&]*)*")


@dataclass(frozen=True, slots=True)
class TransportURI:
    """``[wrapper+...]scheme:target[?option=value&...]``, taken apart.

    The target's own grammar belongs to the transport. A ``?`` starts the options only where options follow
    it, so that a file name or a shell command may hold one. The first wrapper is the outermost; its options
    have its name before them: ``throttle+tcp:127.0.0.1:4444?throttle.rate=50MB/s``.
    """

    scheme: str
    target: str
    options: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``text`` apart; `BadURI` says what a URI looks like when it can't."""
        head, colon, target = text.partition(":")
        *wrappers, scheme = head.split("+")
        if not colon or not all(_SCHEME.fullmatch(name) for name in (*wrappers, scheme)):
            raise BadURI(
                f"{text!r} is not a transport URI: write scheme:target, such as tcp:127.0.0.1:4444 or "
                "file:/var/tmp/guest.img"
            )
        options: dict[str, str] = {}
        before, mark, after = target.rpartition("?")
        if mark and _OPTIONS.fullmatch(after):
            target = before
            for name, value in parse_qsl(after, keep_blank_values=True, strict_parsing=True):
                if name in options:
                    raise BadURI(f"{text!r} gives the option {name!r} twice; give it once")
                options[name] = value
        return cls(scheme, target, options, tuple(wrappers))

    def unwrapped(self) -> tuple[dict[str, str], TransportURI]:
        """The outermost wrapper's options, under their own names, and what it wraps."""
        own, rest = {}, {}
        for name, value in self.options.items():
            wrapper, dot, option = name.partition(".")
            if dot and wrapper == self.wrappers[0]:
                own[option] = value
            else:
                rest[name] = value
        return own, TransportURI(self.scheme, self.target, rest, self.wrappers[1:])

    def __str__(self) -> str:
        head = "+".join((*self.wrappers, self.scheme))
        tail = "&".join(f"{name}={value}" for name, value in self.options.items())
        return f"{head}:{self.target}" + (f"?{tail}" if tail else "")


@dataclass(frozen=True, slots=True)
class Option:
    """One option that a transport understands after the ``?`` of its URI."""

    name: str
    help: str
    default: str = ""
    choices: tuple[str, ...] = ()  # any text where it is empty


@dataclass(frozen=True, slots=True)
class ChannelFeatures:
    """What a channel can do, so that the engine can choose how it commits."""

    two_way: bool = False  # the other side can answer: the hand-over is "ready" / "go"
    #: One way, to something that only keeps the bytes: nobody starts the guest from them before `aclose` has
    #: returned. So until then the guest is the source's, whatever happens.
    stores: bool = False


class Channel(ABC):
    """A stream of bytes to, or from, one other side.

    At most one task may send and at most one may receive at a time; a second one gets `ChannelBusy`. Every
    error of the operating system, of the peer or of a helper becomes a `TransportError` whose cause is kept.

    A channel belongs to whoever connected or accepted it: they end it by `aclose` (orderly) or by `abort`.
    Either may follow the other, and either may be called twice.
    """

    #: What this channel can do.
    features: ChannelFeatures = ChannelFeatures()

    #: Who or what is at the other end, for people: ``127.0.0.1:4444``, ``/var/tmp/a.img``.
    peer: str = ""

    #: Sentences that the user should see and that are no errors, such as a fall-back that was taken.
    notices: tuple[str, ...] = ()

    @abstractmethod
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        """Accept a prefix of ``buffers`` (one-dimensional, of bytes, none of them empty, at least one).

        Returns how many bytes were accepted: at least 1, at most all of them. **Cancelled means that
        nothing was accepted.** This always is a checkpoint, even when the sink is always ready, and it
        never holds the event loop for longer than one bounded non-blocking call or memory copy.

        A buffer may be live guest memory, and it may still be read after this call has returned, until
        `flush` has.

        Raises `ChannelBroken`, `ChannelClosed`, `ChannelBusy`.
        """

    @abstractmethod
    async def receive_some(self, buffer: memoryview) -> int:
        """Fill a prefix of ``buffer`` (not empty) and say how much; 0 is the end of the stream.

        **Cancelled means that nothing was taken.** Always a checkpoint. Raises as `send_some` does.
        """

    @abstractmethod
    async def flush(self) -> None:
        """Return when no accepted buffer will be read any more and all accepted bytes have left this side.

        "Left" means that the peer's kernel has them, or the helper, or the disk, as the transport says. A
        cancel leaves the channel usable; what has been accepted still goes its way.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the channel at once, whatever is clogged or hung. Synchronous, idempotent, never raises.

        Leaves no process, no file descriptor and no partial file behind. What was accepted may be lost. A
        task that is inside a call on this channel gets `ChannelClosed` (or is woken by its own cancel).
        """

    @abstractmethod
    async def aclose(self) -> None:
        """End the channel in order: flush, close, and report what went wrong, a helper's own words included.

        For a channel that `stores` this is the commit: a file gets its name here, and only when all of it is
        on the disk. After an error or a cancel it is as after `abort`. Idempotent.
        """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A block that fails must not commit half a file.
        if kind is None:
            await self.aclose()
        else:
            self.abort()

    def phase_changed(self, phase: str) -> None:  # noqa: B027 - most channels need not know
        """The migration enters this phase: ``setup``, ``rounds``, ``stop``, ``final`` or ``commit``.

        For tools that do something at a certain phase. Called by the source alone; must not block or raise.
        ``pre-switchover`` comes before ``stop`` where it was asked for.
        """

    def waits_for(self) -> str:
        """What stands in the way when nothing moves, for an error: ``its I/O helper is stopped``.

        Empty where that is not known. Quick, and never raises.
        """
        return ""

    def knobs(self) -> Mapping[str, str]:
        """What can be turned while it runs, and how it stands: names as in the URI, ``throttle.rate``."""
        return {}

    def turn(self, knob: str, value: str) -> None:
        """Turn one of `knobs`, at once. `KnobError` for an unknown one, or a value that makes no sense."""
        raise KnobError(f"there is no {knob!r} to turn here; {_these(self.knobs())}")


class Listener(ABC):
    """A place where a channel can be accepted. Owned by whoever called `Transport.listen`."""

    #: Where it listens in fact, for people and for the other side: with the port that the kernel chose.
    uri: str

    @abstractmethod
    async def accept(self) -> Channel:
        """Wait for a source and return its channel; a cancel accepts nobody. Raises `ConnectFailed`."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop listening. Idempotent; a channel that was accepted lives on."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Transport(ABC):
    """One way of moving bytes, named by a URI scheme. Making one opens nothing and is cheap."""

    #: One line for ``kvmmig transports``.
    summary: ClassVar[str] = ""
    #: How its URI is written: ``tcp:HOST:PORT``.
    syntax: ClassVar[str] = ""
    #: The options it understands. Any other one is an error before the transport sees it.
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(self, uri: TransportURI) -> None:
        """Check the URI. Raises `BadURI` with the right form in its text."""
        self.uri = uri
        self._given = uri.options
        self._check_options(uri.scheme)

    def option(self, name: str) -> str:
        """The option's value: as the URI has it, or its default."""
        default = next(option.default for option in self.options if option.name == name)
        return self._given.get(name, default)

    def _check_options(self, owner: str) -> None:
        known = {option.name: option for option in self.options}
        for name, value in self._given.items():
            if name not in known:
                right = f"it knows {', '.join(known)}" if known else "it has none"
                raise BadURI(f"{str(self.uri)!r}: {owner} has no option {name!r}; {right}")
            if known[name].choices and value not in known[name].choices:
                right = " or ".join(f"{name}={choice}" for choice in known[name].choices)
                raise BadURI(f"{str(self.uri)!r}: {name}={value} is not understood; write {right}")

    @abstractmethod
    async def connect(self) -> Channel:
        """The source's side: a channel to write to. Raises `ConnectFailed`; a cancel leaves nothing."""

    @abstractmethod
    async def listen(self) -> Listener:
        """The destination's side: a place to read from. Raises `ConnectFailed`; a cancel leaves nothing."""


class Wrapper(Transport):
    """A transport around a transport, named before it: ``throttle+tcp:...``. It wraps channels."""

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        """Check this wrapper's options, the first of ``uri``. ``inner`` is what the rest of it names."""
        self.uri = uri
        self.inner = inner
        self._given, _ = uri.unwrapped()
        self._check_options(uri.wrappers[0])

    @abstractmethod
    async def wrap(self, channel: Channel) -> Channel:
        """A channel around ``channel``, which is aborted if this fails or is cancelled."""

    async def connect(self) -> Channel:
        return await _wrapped(await self.inner.connect(), self)

    async def listen(self) -> Listener:
        return _WrappedListener(await self.inner.listen(), self)


class _WrappedListener(Listener):
    """Says where the inner one listens: the other side need not have the same wrapper."""

    def __init__(self, inner: Listener, wrapper: Wrapper) -> None:
        self.uri = inner.uri
        self._inner = inner
        self._wrapper = wrapper

    async def accept(self) -> Channel:
        return await _wrapped(await self._inner.accept(), self._wrapper)

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _wrapped(channel: Channel, wrapper: Wrapper) -> Channel:
    try:
        return await wrapper.wrap(channel)
    except BaseException:
        channel.abort()
        raise


class PassingChannel(Channel):
    """Does what the channel below it does; the base of a wrapper's channel. Owns ``below``."""

    def __init__(self, below: Channel) -> None:
        self.below = below
        self.features = below.features
        self.peer = below.peer
        self.notices = below.notices

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

    def phase_changed(self, phase: str) -> None:
        self.below.phase_changed(phase)

    def waits_for(self) -> str:
        return self.below.waits_for()

    def knobs(self) -> Mapping[str, str]:
        return {**self.below.knobs(), **self.own_knobs()}

    def turn(self, knob: str, value: str) -> None:
        if knob in self.own_knobs():
            self.turn_own(knob, value)
        elif knob in self.below.knobs():
            self.below.turn(knob, value)
        else:
            raise KnobError(f"there is no {knob!r} to turn here; {_these(self.knobs())}")

    def own_knobs(self) -> Mapping[str, str]:
        """This wrapper's alone, without those of what it wraps."""
        return {}

    def turn_own(self, knob: str, value: str) -> None:
        """Turn one of `own_knobs`. Raises `KnobError` for a value that makes no sense."""
        raise NotImplementedError


def _these(knobs: Mapping[str, str]) -> str:
    if not knobs:
        return "only wrappers have knobs, such as throttle+ and fault+ in front of the URI"
    return "there are " + ", ".join(f"{name} ({value})" for name, value in knobs.items())


class OneAtATime:
    """Raises `ChannelBusy` when a second task enters; for the authors of transports.

    ``with self._sending: ...`` around the whole of `Channel.send_some`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise ChannelBusy(f"another task is {self._what} on this channel; let one task do it at a time")
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False
