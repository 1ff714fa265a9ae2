"""Who connects to a destination: several at a time, until one of them sends a guest that may come.

A port scan, an HTTP request, a client that says nothing or only a hello: none of them ends the destination or
takes its memory, and none keeps the right source waiting. Each has a bound in time, and in bytes: those of a
hello. Where there are too many, whoever has got no further for longest makes room.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

import trio

from kvmmig import stream
from kvmmig.errors import ConnectFailed, KvmmigError, MigrationError, StreamError
from kvmmig.kvm import System
from kvmmig.machine.config import MachineDescription
from kvmmig.migration.conversation import Conversation
from kvmmig.migration.policy import Limits
from kvmmig.migration.welcome import Welcome
from kvmmig.transport.boundedlog import BoundedLog
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.supervision import GuardedListener
from kvmmig.transport.toolkit import own_tasks

_log = logging.getLogger(__name__)

#: Clients at a time, those not counted that a wrapper still shakes hands with.
MOST_CLIENTS = 32
#: Tasks that wait in `accept`, where several may: each layer of wrappers may have 16 in a handshake.
_ACCEPTING = 64
#: Seconds between two tries where a listener fails, doubled each time; then it has failed for good.
_PAUSE = 0.1
_TRIES = 5
#: Where it is crowded, so many seconds pass between two clients: a flood of them is not to hold the loop.
_CROWDED_PAUSE = 0.005
#: Seconds that a source waits for another one that sends its guest; then it is told so.
_TURN = 10.0


@dataclass(frozen=True)
class Candidate:
    """A source whose guest fits and is welcome, and which has begun to send it: ``first`` is its first event.

    Whoever takes it owns ``stack``, which ends the channel.
    """

    conversation: Conversation
    description: MachineDescription
    first: stream.Event
    stack: AsyncExitStack


class _Client:
    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack  # ends its channel
        self.scope = trio.CancelScope()
        self.progress_at = trio.current_time()  # when it connected, or got further
        self.said_hello = False


class Clients:
    """The clients of one listener. Use `accepting`."""

    def __init__(
        self,
        listener: GuardedListener,
        *,
        welcome: Welcome,
        limits: Callable[[], Limits],
        held: Callable[[], int],
        first_decides: bool,
        nursery: trio.Nursery,
        strays: trio.Nursery,
    ) -> None:
        self._listener = listener
        self._welcome = welcome
        self._limits = limits
        self._held = held
        self._first_decides = first_decides
        self._nursery = nursery
        self._strays = strays
        self._present: list[_Client] = []
        self._line: list[tuple[Candidate, trio.Event]] = []  # an event is set when its candidate is taken
        self._warnings = BoundedLog(_log)
        self._news = trio.Event()
        self._refusal: KvmmigError | None = None  # or failure, of the first that had said its hello
        self._failure: ConnectFailed | None = None  # of the listener
        #: Why those that are still there at the end are refused.
        self.ending: KvmmigError | None = None

    @property
    def wait(self) -> bool:
        """Somebody has begun to send a guest, and nobody has taken it yet."""
        return bool(self._line)

    @property
    def have_ended(self) -> bool:
        """None is there, and none can come any more."""
        return self._failure is not None and not self._present

    async def next(self) -> Candidate:
        """The next candidate. Raises `ConnectFailed` where none can come any more.

        With ``first_decides`` also what is wrong with a source that has said a whole hello.
        """
        while not self._line:
            if self._refusal is not None and self._first_decides:
                raise self._refusal
            if self._failure is not None and not self._present:
                raise self._failure
            await self._news.wait()
        candidate, taken = self._line.pop(0)
        taken.set()
        return replace(candidate, stack=candidate.stack.pop_all())

    async def accept_all(self) -> None:
        """One after the other, for ever, or until the listener fails for good."""
        failures = 0
        while True:
            async with AsyncExitStack() as stack:
                try:
                    channel = await stack.enter_async_context(self._listener.accept())
                except ConnectFailed as error:
                    failures += 1
                    if failures == _TRIES:
                        self._failure = error
                        self._tell()
                        return
                    await trio.sleep(_PAUSE * 2**failures)
                    continue
                failures = 0
                self._nursery.start_soon(self._serve, channel, stack.pop_all())
            if len(self._present) > MOST_CLIENTS // 2:
                await trio.sleep(_CROWDED_PAUSE)
            else:
                await trio.lowlevel.checkpoint()

    async def _serve(self, channel: GuardedChannel, stack: AsyncExitStack) -> None:
        """One client, until somebody takes it or it is refused. Whatever goes wrong is its own affair."""
        client = _Client(stack)
        self._present.append(client)
        if len(self._present) > MOST_CLIENTS:
            min(self._present, key=lambda one: one.progress_at).scope.cancel()
        try:
            async with stack:
                conversation = Conversation(channel, self._strays)
                with client.scope:
                    try:
                        await self._hear(client, conversation)
                    except Exception as error:
                        self._warn(conversation, error)
                        await conversation.refuse(error)
                    except BaseException as error:
                        await self._end(client, conversation, error)
                        raise
        finally:
            self._forget(client)
            self._tell()

    async def _end(self, client: _Client, conversation: Conversation, cancel: BaseException) -> None:
        if not client.scope.cancel_called:
            await conversation.refuse(self.ending or cancel)
            return
        crowded = MigrationError("so many others connect here that a source which got no further made room")
        self._warn(conversation, crowded)
        self._forget(client)
        if client.said_hello:
            await conversation.refuse(crowded)

    async def _hear(self, client: _Client, conversation: Conversation) -> None:
        self._welcome.check_source(conversation.channel)
        hello = await self._bounded(conversation, "no hello")
        assert isinstance(hello, stream.Hello)  # the decoder lets nothing else come first
        client.said_hello, client.progress_at = True, trio.current_time()
        try:
            description = await check_hello(hello, self._welcome, self._held())
            await conversation.work(lambda: conversation.say(stream.Kind.ACCEPT))
            first = await self._bounded(conversation, "nothing of its guest")
        except KvmmigError as error:
            self._refusal = self._refusal or error
            raise
        client.progress_at = trio.current_time()
        await self._wait_for_turn(Candidate(conversation, description, first, client.stack))

    async def _bounded(self, conversation: Conversation, what: str) -> stream.Event:
        seconds = self._limits().setup_timeout
        with trio.move_on_after(seconds):
            return await conversation.work(conversation.event)
        raise MigrationError(f"{conversation.peer} sent {what} within {seconds:g} s")

    async def _wait_for_turn(self, candidate: Candidate) -> None:
        place = (candidate, trio.Event())
        self._line.append(place)
        self._tell()
        try:
            with trio.move_on_after(_TURN):
                await place[1].wait()
        finally:
            if not place[1].is_set():
                self._line.remove(place)
        if not place[1].is_set():
            raise MigrationError("another source sends its guest here now; try again when that is over")

    def _warn(self, conversation: Conversation, error: Exception) -> None:
        if not isinstance(error, KvmmigError):
            _log.error("a client was passed over by a bug of kvmmig", exc_info=error)
            return
        text = str(error)
        named = text if conversation.peer in text else f"{conversation.peer}: {text}"
        self._warnings.warn(f"a client was passed over: {named}")

    def _forget(self, client: _Client) -> None:
        with suppress(ValueError):
            self._present.remove(client)

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


@asynccontextmanager
async def accepting(
    listener: GuardedListener,
    *,
    welcome: Welcome,
    limits: Callable[[], Limits],
    held: Callable[[], int],
    first_decides: bool,
    strays: trio.Nursery,
) -> AsyncIterator[Clients]:
    """Accept clients for the block; at its end those are refused that nobody has taken.

    ``held`` says how many bytes of memory are there for the guest already.

    ``first_decides``: a source that has said a whole hello and is refused ends it, see `Clients.next`. What a
    channel does that can't be ended is left behind in ``strays``.
    """
    async with own_tasks() as nursery:
        clients = Clients(
            listener,
            welcome=welcome,
            limits=limits,
            held=held,
            first_decides=first_decides,
            nursery=nursery,
            strays=strays,
        )
        for _ in range(_ACCEPTING if listener.several else 1):
            nursery.start_soon(clients.accept_all)
        yield clients


async def check_hello(hello: stream.Hello, welcome: Welcome, held: int) -> MachineDescription:
    """The machine that a hello describes. Raises `StreamError`, `StateMismatch` where it can't come here.

    ``held`` bytes of memory are there for it already.
    """
    description = MachineDescription.decode(bytes(hello.machine))
    if hello.n_pages * stream.PAGE_SIZE != description.memory:
        raise StreamError(
            f"the hello names {hello.n_pages} pages, but a machine of {description.memory} bytes"
        )
    welcome.check_guest(description)
    await trio.to_thread.run_sync(_check_fits, description, held)
    return description


def _check_fits(description: MachineDescription, held: int) -> None:
    with System.open() as system:
        description.check_fits(system, held)
