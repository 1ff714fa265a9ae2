"""The transport contract: what a transport must promise, and nothing about how.

A *transport* is a cheap value made from a URI. It connects (the source's side) or listens (the destination's
side), and yields *channels*; a channel moves bytes. Everything here is about bytes: no transport knows what a
page, a round or a machine is.

The contract is small on purpose, and each sentence of it is tested by ``kvmmig.testing``. The engine does not
rely on it: between the engine and every channel stands the guard, `kvmmig.transport.guard`.
"""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from kvmmig.errors import BadURI, KnobError
from kvmmig.transport.peers import Peer
from kvmmig.transport.uri import TransportURI


@dataclass(frozen=True, slots=True)
class Option:
    """One option that a transport understands after the ``?`` of its URI.

    Every option ``NAME`` can also be given as ``NAME.file=PATH``: its value is then what the file says, less
    a last newline, and is not printed. A ``secret`` one can be given in no other way.
    """

    name: str
    help: str
    default: str = ""
    choices: tuple[str, ...] = ()  # any text where it is empty
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Knob:
    """Something that can be turned while a channel is in use, such as a rate.

    ``value`` says how it stands, as text. ``turn`` turns it at once, and raises `KnobError` for a value that
    makes no sense; nothing has changed then. Both are called on the event loop and are quick.
    """

    value: Callable[[], str]
    turn: Callable[[str], None]


class AnyChannel(ABC):
    """What both directions have in common: whom it leads to, and its end.

    Whoever opened a channel ends it by `aclose` (orderly) or by `abort`. Either may follow the other, and
    either may be called twice. As an async context manager it is closed in order at the end of the block, and
    aborted where the block fails: it must not commit half a file.
    """

    #: Who or what is at the other end, for people: ``127.0.0.1:4444``, ``/var/tmp/a.img``.
    peer: str = ""
    #: What the kernel says of the other end; None where it says nothing, as of a file.
    identity: Peer | None = None
    #: The other end is known to be the right one: it has proved that, by a secret or a certificate, or
    #: whoever wrote the URI has said whose it is. Else a user of this host who is a stranger gets no guest,
    #: and gives none.
    proved: bool = False
    #: Sentences that the user should see and that are no errors, such as a fall-back that was taken.
    notices: tuple[str, ...] = ()
    #: What both ends know of this one connection, and whoever stands between them does not: a proof that is
    #: made over this channel is bound to it. Empty where there is no such thing.
    binding: bytes = b""
    #: The channel that this one wraps, where it does; set by its `Wrapper`.
    wraps: AnyChannel | None = None
    #: What can be turned while it is in use: names as in the URI, ``throttle.rate``.
    knobs: Mapping[str, Knob] = {}

    @abstractmethod
    def abort(self) -> None:
        """End the channel at once, whatever is clogged or hung. Synchronous, idempotent, never raises.

        Leaves no process, no file descriptor and no partial file behind. What was accepted may be lost. A
        task that is inside a call on this channel gets `ChannelClosed` (or is woken by its own cancel).
        """

    @abstractmethod
    async def aclose(self) -> None:
        """End the channel in order: flush, close, and report what went wrong, a helper's own words included.

        For a transport that `stores <Transport.stores>` this is the commit: a file gets its name here, and
        only when all of it is on the disk. After an error or a cancel it is as after `abort`. Idempotent;
        always a checkpoint.
        """

    def waits_for(self) -> str:
        """What stands in the way when nothing moves, for an error: ``its I/O helper is stopped``.

        Empty where that is not known. Quick, and never raises.
        """
        return ""

    def counters(self) -> Mapping[str, float]:
        """What this channel counts itself: ``{"zstd.sent-bytes": 123456}``. Shown with a migration's figures.

        Names are like those of knobs; the last word is the unit. Quick, and never raises.
        """
        return {}

    @property
    def two_way(self) -> bool:
        """Whether the other side can answer."""
        return isinstance(self, Channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.aclose()
        else:
            self.abort()


class SendChannel(AnyChannel):
    """A stream of bytes to one other side.

    At most one task may send at a time; a second one gets `ChannelBusy`. Every error of the operating system,
    of the peer, of a library or of a helper becomes a `TransportError` whose cause is kept.
    """

    #: It has copied what it accepts, so that the caller may use the buffers again at once. Otherwise they are
    #: the channel's until `flush` has returned.
    copies: bool = False
    #: So many bytes are best offered at a time. The engine offers no more, and less where there is no more.
    call_size: int = 4 << 20

    @abstractmethod
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        """Accept a prefix of ``buffers`` (one-dimensional, of bytes, none of them empty, at least one).

        Returns how many bytes were accepted: at least 1, at most all of them. **Cancelled means that
        nothing was accepted.** This always is a checkpoint, even when the sink is always ready, and it
        never holds the event loop for longer than one bounded non-blocking call or memory copy.

        A buffer may be live guest memory, which changes while it is sent. Who computes something from it, a
        checksum, a cipher, a compression, makes a copy first and sends the copy.

        Raises `ChannelBroken`, `ChannelClosed`, `ChannelBusy`.
        """

    @abstractmethod
    async def flush(self) -> None:
        """Return when no accepted buffer will be read any more and all accepted bytes have left this side.

        "Left" means that the peer's kernel has them, or the helper, or the disk, as the transport says. A
        cancel leaves the channel usable; what has been accepted still goes its way. Always a checkpoint.
        """


class ReceiveChannel(AnyChannel):
    """A stream of bytes from one other side. At most one task may receive at a time."""

    #: A descriptor of the regular file that holds exactly the bytes that are received, where there is one: it
    #: may be read and mapped while the channel lasts. The channel closes it.
    file: int | None = None

    @abstractmethod
    async def receive_some(self, buffer: memoryview) -> int:
        """Fill a prefix of ``buffer`` (not empty) and say how much; 0 is the end of the stream, and stays 0.

        **Cancelled means that nothing was taken.** Always a checkpoint. Raises as `SendChannel.send_some`
        does.
        """


class Channel(SendChannel, ReceiveChannel):
    """Both directions, to one other side that can answer: one task sends while another receives."""


class RandomAccessChannel(AnyChannel):
    """Into a store that takes bytes at any offset, in any order, and again: a file, a block device.

    What it accepts it need not copy: buffers are the channel's until `settle` or `flush` has returned. Until
    then nobody offers bytes for the same offsets again. At most one task may use it at a time.
    """

    #: So many bytes are best offered at a time. The engine offers no more.
    call_size: int = 32 << 20

    @abstractmethod
    async def write_some(self, pieces: Sequence[tuple[int, memoryview]]) -> int:
        """Accept a prefix of ``pieces``: offsets, and the bytes that belong there, not empty; at least one.

        Offsets and lengths are multiples of 4096; buffers that begin at one too are written fastest. Returns
        how many bytes were accepted: at least 4096 and a multiple of it, at most all. **Cancelled means that
        nothing was accepted.** Always a checkpoint, and as quick as `SendChannel.send_some`. A buffer may be
        live guest memory.

        Bytes that were never written are zero. Raises `ChannelBroken`, `ChannelClosed`, `ChannelBusy`.
        """

    @abstractmethod
    async def settle(self) -> None:
        """Return when no accepted buffer will be read any more. A cancel leaves the channel usable."""

    @abstractmethod
    async def flush(self) -> None:
        """Settle, and have all that was accepted on the disk. A cancel leaves the channel usable."""


class Listener(ABC):
    """A place where channels can be accepted, one after the other."""

    #: Where it listens in fact, for people and for the other side: with the port that the kernel chose.
    uri: TransportURI
    #: Several tasks may wait in `accept` at a time. Where a handshake is a part of it they must: a client
    #: that says nothing would hold up all others. A `Wrapper`'s listener has it already.
    several: bool = False

    @abstractmethod
    def accept(self) -> AbstractAsyncContextManager[ReceiveChannel]:
        """Wait for a source; the block has its channel, and lasts as long as the channel.

        A cancel accepts nobody. A source that has gone away again while it waited is passed over. Leaving the
        block ends the channel: in order, unless it was ended before or the block fails. Raises
        `ConnectFailed`.
        """


class Transport(ABC):
    """One way of moving bytes, named by a URI scheme. Making one opens nothing and is cheap."""

    #: One line for ``kvmmig transports``.
    summary: ClassVar[str] = ""
    #: How its URI is written: ``tcp:HOST:PORT``.
    syntax: ClassVar[str] = ""
    #: The options it understands. Any other one is an error before the transport sees it.
    options: ClassVar[tuple[Option, ...]] = ()

    #: It goes one way, to something that only keeps the bytes: nobody starts the guest from them before
    #: `AnyChannel.aclose` has returned. So until then the guest is the source's, whatever happens. "kvmmig
    #: save" and "restore" take such transports.
    stores: bool = False
    #: It can also write at any offset: `connect_random_access`. An image is written so where it can be.
    random_access: bool = False
    #: What `listen` receives is there when it begins, as a file is; otherwise it waits for a source.
    arrives_at_once: bool = False
    #: It runs a program that the URI names: where a machine's clients may start none, it is refused to them.
    starts_programs: bool = False
    #: Its target is a path of the user's, which commands make absolute before it goes to another process.
    target_is_path: ClassVar[bool] = False
    #: Whose it is, for errors: ``built in``, ``from kvmmig-extra 0.1``. Set by `transport_for`.
    origin: str = "from this program"

    def __init__(self, uri: TransportURI) -> None:
        """Check the URI. Raises `BadURI` with the right form in its text."""
        self.uri = uri
        self._given = self._take_options(uri.scheme, uri.options)

    def option(self, name: str) -> str:
        """The option's value: as the URI has it, or its file, or its default."""
        default = next(option.default for option in self.options if option.name == name)
        return self._given.get(name, default)

    @abstractmethod
    def connect(self) -> AbstractAsyncContextManager[SendChannel]:
        """The source's side: the block has a channel to write to, a `Channel` where there is a way back.

        The channel may own tasks: they live in the block. Leaving it ends the channel: in order, unless it
        was ended before or the block fails. Raises `ConnectFailed`; a cancel leaves nothing.
        """

    def connect_random_access(self) -> AbstractAsyncContextManager[RandomAccessChannel]:
        """As `connect`, for a transport that says ``random_access``; no other one has this."""
        raise NotImplementedError

    @abstractmethod
    def listen(self) -> AbstractAsyncContextManager[Listener]:
        """The destination's side: a place to read from, for the block. Channels that it accepted live on.

        Raises `ConnectFailed`; a cancel leaves nothing.
        """

    def _take_options(self, owner: str, given: Mapping[str, str]) -> dict[str, str]:
        known = {option.name: option for option in self.options}
        taken: dict[str, str] = {}
        for written, value in given.items():
            name, from_file = written, False
            if written not in known and written.endswith(".file"):
                name, from_file = written.removesuffix(".file"), True
            if name not in known:
                right = f"it knows {', '.join(known)}" if known else "it has none"
                raise BadURI(f"{str(self.uri)!r}: {owner} has no option {name!r}; {right}")
            option = known[name]
            if name in taken:
                raise BadURI(f"{str(self.uri)!r} gives {name!r} twice: by itself and by a file; give it once")
            if from_file:
                value = _read_option(self.uri, written, value, secret=option.secret)
            elif option.secret:
                raise BadURI(
                    f"{owner}: {name} is a secret, and whoever lists processes or reads a log sees a URI; "
                    f"put it into a file and write {name}.file=PATH"
                )
            if option.choices and value not in option.choices:
                right = " or ".join(f"{name}={choice}" for choice in option.choices)
                was = "what that file says" if from_file else f"{name}={value}"
                raise BadURI(f"{str(self.uri)!r}: {was} is not understood; write {right}")
            taken[name] = value
        return taken


def _read_option(uri: TransportURI, name: str, path: str, *, secret: bool) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if secret and mode & 0o077:
                raise BadURI(
                    f"{str(uri)!r}: {path} is open to other users (mode {mode:04o}); make it private by "
                    f"chmod 600 {shlex.quote(path)}"
                )
            return file.read(1 << 20).removesuffix("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise BadURI(f"{str(uri)!r}: {name}: can't read {path}: {reason}") from error


def find_knob(knobs: Mapping[str, Knob], name: str) -> Knob:
    """One of ``knobs`` by its name. Raises `KnobError` with the names that there are."""
    if name in knobs:
        return knobs[name]
    if not knobs:
        right = "this transport has none; wrappers do, such as throttle+ and fault+ in front of the URI"
    else:
        right = "there are " + ", ".join(f"{name} ({knob.value()})" for name, knob in knobs.items())
    raise KnobError(f"there is no {name!r} to turn here; {right}")
