"""The two ends of a channel under test, set up afresh for every check, and the one sentence of a failure."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from kvmmig.errors import TransportError
from kvmmig.transport import Listener, ReceiveChannel, SendChannel, Transport, TransportURI, Wrapper

PATIENCE = 30.0  # seconds that a check waits for what should take milliseconds

T = TypeVar("T")


class Nonconformance(AssertionError):
    """The channel breaks the contract; the text is one sentence that says how."""


class NotApplicable(Exception):
    """The check is about something that this transport has not; it passes."""


@dataclass(frozen=True)
class Ends:
    """The two ends of one fresh channel."""

    sender: SendChannel
    #: Returns the receiver; for a stored channel only after the sender's `aclose`.
    receive: Callable[[], Awaitable[ReceiveChannel]]
    #: Whether the bytes can be received only when all were sent: a file, not a connection.
    stored: bool


#: What a check is given, a function that makes afresh: the destination's transport; or the source's and the
#: destination's, where the first does not follow from where the second listens; or a context in which there
#: are the ends of a channel.
Maker = Callable[[], Transport | tuple[Transport, Transport] | AbstractAsyncContextManager[Ends]]
Check = Callable[[Maker], Awaitable[None]]


def stream_ends(sender: SendChannel, receiver: ReceiveChannel) -> Ends:
    """The ends of a connection."""

    async def receive() -> ReceiveChannel:
        return receiver

    return Ends(sender, receive, stored=False)


def towards(destination: Transport, uri: TransportURI) -> Transport:
    """The source's transport to where ``destination`` listens in fact, which is ``uri``."""
    asked = destination.uri
    return rebuilt(destination, TransportURI(uri.scheme, uri.target, asked.options, asked.wrappers))


def rebuilt(transport: Transport, uri: TransportURI) -> Transport:
    """A transport of the same class, and in the same wrappers, from another URI."""
    if isinstance(transport, Wrapper):
        return type(transport)(uri, rebuilt(transport.inner, uri.unwrapped()[1]))
    return type(transport)(uri)


class Hosts:
    """Enters contexts, each in a task of its own: a channel may own a nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._leave = trio.Event()

    async def enter(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """It is left when `hosting` ends."""
        thing: T = await self._nursery.start(self._host, make)
        return thing

    async def _host(
        self, make: Callable[[], AbstractAsyncContextManager[T]], task_status: trio.TaskStatus[T]
    ) -> None:
        async with make() as thing:
            task_status.started(thing)
            await self._leave.wait()

    def leave(self) -> None:
        self._leave.set()


@asynccontextmanager
async def hosting() -> AsyncIterator[Hosts]:
    async with trio.open_nursery() as nursery:
        hosts = Hosts(nursery)
        yield hosts
        hosts.leave()


@asynccontextmanager
async def transport_ends(
    destination: Transport, source: Transport | None = None, *, stored: bool = False
) -> AsyncIterator[Ends]:
    """The ends of a fresh channel: both sides are set up at the same time, as a handshake needs it.

    Unless it stores, or all must be sent before the destination can read it: ``stored``.
    """
    async with hosting() as hosts:
        if destination.stores or stored:

            async def read() -> ReceiveChannel:
                listener = await hosts.enter(destination.listen)
                return await hosts.enter(listener.accept)

            yield Ends(await hosts.enter((source or destination).connect), read, stored=True)
        else:
            listener: Listener = await hosts.enter(destination.listen)
            yield stream_ends(*await met(hosts, source or towards(destination, listener.uri), listener))


async def met(hosts: Hosts, source: Transport, listener: Listener) -> tuple[SendChannel, ReceiveChannel]:
    """Connect and accept at the same time."""
    receivers: list[ReceiveChannel] = []

    async def accept() -> None:
        receivers.append(await hosts.enter(listener.accept))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        sender = await hosts.enter(source.connect)
    return sender, receivers[0]


def transports(maker: Maker) -> tuple[Transport | None, Transport]:
    """The source's, where it does not follow, and the destination's. Raises `NotApplicable`."""
    match maker():
        case Transport() as destination:
            return None, destination
        case (source, destination):
            return source, destination
    raise NotApplicable("the maker gives ends, no transports")


def _ends(maker: Maker) -> AbstractAsyncContextManager[Ends]:
    made = maker()
    if isinstance(made, Transport):
        return transport_ends(made)
    if isinstance(made, tuple):
        source, destination = made
        return transport_ends(destination, source)
    return made


@asynccontextmanager
async def opened(maker: Maker) -> AsyncIterator[Ends]:
    """The maker's ends, aborted afterwards; and before, where a call does not even end by its cancel."""
    receivers: list[ReceiveChannel] = []

    watch = trio.CancelScope(shield=True)

    async def give_up() -> None:
        with watch:
            await trio.sleep(PATIENCE + 1)
            abort()

    def abort() -> None:
        for channel in (ends.sender, *receivers):
            channel.abort()

    async with _ends(maker) as ends, trio.open_nursery() as nursery:
        if not ends.stored:
            receivers.append(await ends.receive())

        async def receive() -> ReceiveChannel:
            if ends.stored:
                receivers.append(await ends.receive())
            return receivers[-1]

        nursery.start_soon(give_up)
        try:
            yield Ends(ends.sender, receive, ends.stored)
        finally:
            abort()
            watch.cancel()


def promise(check: Check) -> Check:
    """A check fails with one sentence, whatever goes wrong, and also when it lasts too long."""
    promised = " ".join((check.__doc__ or "").split("\n\n")[0].split())

    @functools.wraps(check)
    async def checked(maker: Maker) -> None:
        with one_sentence(promised):
            await check(maker)

    return checked


@contextmanager
def one_sentence(promised: str) -> Iterator[None]:
    """Whatever leaves this block is one `Nonconformance`, which ends with what was ``promised``."""
    scope = trio.move_on_after(PATIENCE)
    hung = f"a call has not ended after {PATIENCE:g} s"
    try:
        with scope:
            yield
    except BaseException as error:
        told = _first(error)
        if isinstance(told, KeyboardInterrupt | GeneratorExit | trio.Cancelled):
            raise
        if isinstance(told, NotApplicable):
            return
        if scope.cancel_called:
            what = hung
        elif isinstance(told, Nonconformance):
            what = str(told)
        elif isinstance(told, TransportError):
            what = f"{told!r}, an error that the contract has no place for here"
        else:
            what = f"{told!r} came out of the channel, and only a TransportError may"
        raise Nonconformance(f"{what}. The promise: {promised}") from error
    if scope.cancel_called:
        raise Nonconformance(f"{hung}. The promise: {promised}")


def _first(error: BaseException) -> BaseException:
    """What the reader should know first of a group."""
    while isinstance(error, BaseExceptionGroup):
        told = error.subgroup(Nonconformance) or error.split(trio.Cancelled)[1] or error
        error = told.exceptions[0]
    return error
