"""The other side: a guest arrives through a channel and goes on running here.

The machine is built from the stream's hello, exactly as the source describes it, and its pages are received
straight into guest memory. It starts only when the source has said "go" (two-way), or when the stream was
whole to its last byte (one-way). Until then whatever happens leaves the guest with the source; and where
sources connect, this side goes back to listening for the next one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from time import perf_counter

import trio

from kvmmig import stream
from kvmmig.errors import KvmmigError, MigrationError
from kvmmig.machine.machine import Machine
from kvmmig.machine.populating import Reserve
from kvmmig.migration.clients import Candidate, Clients, accepting, check_hello
from kvmmig.migration.conversation import Conversation
from kvmmig.migration.policy import Limits
from kvmmig.migration.receiving import Receiver
from kvmmig.migration.stall_meter import Durations, StallMeter
from kvmmig.migration.welcome import Welcome
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.transport.supervision import GuardedListener, listening
from kvmmig.transport.toolkit import own_tasks, unixsockets

#: Seconds that a source may be silent while another one waits.
_SILENCE_IN_THE_WAY = 5.0
#: Seconds that an end of this side's leaves for the source to hear that its guest runs here.
_LEAVE_TO_SAY = 2.0


class IncomingMigration:
    """Receives one guest::

    incoming = IncomingMigration(transport_for("tcp:0.0.0.0:4444"))
    async with incoming.machine() as machine:
        ...  # it runs
    """

    def __init__(
        self,
        transport: Transport | TransportURI | str,
        *,
        output: Callable[[bytes], None] | None = None,
        limits: Limits | Callable[[], Limits] | None = None,
        welcome: Welcome | None = None,
        keep_listening: bool = True,
        on_listening: Callable[[TransportURI], None] | None = None,
        on_connected: Callable[[], None] | None = None,
        reserve: Reserve | None = None,
        on_setback: Callable[[KvmmigError], None] | None = None,
        on_here: Callable[[Machine], None] | None = None,
        strays: trio.Nursery | None = None,
    ) -> None:
        """``transport`` may be a URI. ``output`` gets what the guest writes to its serial port.

        ``reserve`` is memory for the guest that is there already; whoever made it closes it.

        ``welcome`` says which guests may come, and from whom; ``limits`` bounds a source that is silent, and
        may be a function that says how they are now.

        Where sources connect, what one of them fails with does not end this: it goes on listening, and only
        ``on_setback`` is told of it, for one that had begun to send its guest. Without ``keep_listening`` the
        first source that says a whole hello decides. Who says none is passed over in either case.

        ``on_listening`` gets where it listens in fact; ``on_connected`` is told that a source has begun;
        ``on_here`` gets the machine when the guest is here, before the
        source is told so. All must be quick and not raise. What a channel does that can't be ended is left
        behind in ``strays``, a nursery that outlives this; without one, the end of `machine` waits for it.
        """
        self._transport = transport if isinstance(transport, Transport) else transport_for(transport)
        self._output = output
        self._limits = _as_function(limits if limits is not None else Limits())
        self._welcome = welcome if welcome is not None else Welcome()
        self._keep_listening = keep_listening
        self._on_listening = on_listening
        self._on_connected = on_connected
        self._reserve = reserve
        self._on_setback = on_setback
        self._on_here = on_here
        self._strays = strays
        self._conversation: Conversation | None = None
        self._receiver: Receiver | None = None
        self._meter = StallMeter()
        self._gone = trio.Event()  # all has been said to the source
        #: Seconds from the first page to the guest's start.
        self.total_time: float | None = None

    @property
    def peer(self) -> str:
        """Who sends the guest, and whose process that is; empty before anybody does."""
        return self._conversation.peer if self._conversation is not None else ""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know although it is no error."""
        return self._conversation.channel.notices if self._conversation is not None else ()

    @property
    def received_bytes(self) -> int:
        """Bytes taken from the channel."""
        return self._conversation.decoder.position if self._conversation is not None else 0

    @property
    def received_pages(self) -> int:
        """Pages that came with their bytes."""
        return self._receiver.received_pages if self._receiver is not None else 0

    @property
    def zero_pages(self) -> int:
        """Pages that were only said to be zero."""
        return self._receiver.zero_pages if self._receiver is not None else 0

    @property
    def turns(self) -> Durations:
        """The turns of the event loop while receiving."""
        return self._meter.turns.snapshot()

    @asynccontextmanager
    async def machine(self) -> AsyncIterator[Machine]:
        """Listen, receive one guest, and give its machine; it runs if it ran at the source, else is paused.

        Call it once.

        Raises `ConnectFailed` where nobody can connect. Where the guest is there at once, as in a file, also
        `StreamError` for bytes that are no whole stream, `StateMismatch` for a guest that can't live here,
        `MigrationError` where the source gave up, `ChannelBroken` where the channel broke; so it does for one
        that connects without ``keep_listening``. After any of them, and after a cancel, nothing is left here,
        and a source that can listen has been told why. The source hears that the guest runs, and the channel
        is closed, while it runs already: nothing that the channel does can end it.
        """
        async with AsyncExitStack() as stack:
            strays = self._strays
            if strays is None:
                strays = await stack.enter_async_context(own_tasks())
            async with listening(self._transport, strays) as listener:
                if self._welcome.includes_others and listener.uri.scheme == "unix":
                    with suppress(OSError):  # then they can't connect, which they see
                        await trio.to_thread.run_sync(unixsockets.open_to_all, listener.uri.target)
                if self._on_listening is not None:
                    self._on_listening(listener.uri)
                with self._meter:
                    receive = self._receive_at_once if self._transport.arrives_at_once else self._receive_one
                    machine = await receive(listener, stack, strays)
            try:
                yield machine
            finally:
                # Else a source whose guest ends as it arrives would never know that it had come so far.
                with trio.move_on_after(_LEAVE_TO_SAY, shield=True):
                    await self._gone.wait()
            await self._gone.wait()

    async def _receive_at_once(
        self, listener: GuardedListener, stack: AsyncExitStack, strays: trio.Nursery
    ) -> Machine:
        """What is there when this begins, and is nobody else's than the operator's."""
        async with AsyncExitStack() as own:
            channel = await own.enter_async_context(listener.accept())
            conversation = Conversation(channel, strays)
            try:
                hello = await self._first_words(conversation)
                assert isinstance(hello, stream.Hello)  # the decoder lets nothing else come first
                description = await check_hello(hello, self._welcome, self._held())
                await conversation.work(lambda: conversation.say(stream.Kind.ACCEPT))
                first = await conversation.work(conversation.event)
            except BaseException as error:
                await conversation.refuse(error)
                raise
            candidate = Candidate(conversation, description, first, own.pop_all())
        return await self._receive(candidate, stack, strays, lambda: None)

    async def _first_words(self, conversation: Conversation) -> stream.Event:
        seconds = self._limits().setup_timeout
        with trio.move_on_after(seconds):
            return await conversation.work(conversation.event)
        raise MigrationError(f"{conversation.peer} sent no hello within {seconds:g} s")

    async def _receive_one(
        self, listener: GuardedListener, stack: AsyncExitStack, strays: trio.Nursery
    ) -> Machine:
        """From whoever connects first and is welcome; where that fails, from the next one."""
        async with accepting(
            listener,
            welcome=self._welcome,
            limits=self._limits,
            held=self._held,
            first_decides=not self._keep_listening,
            strays=strays,
        ) as clients:
            while True:
                try:
                    candidate = await clients.next()
                except KvmmigError as error:
                    failure = error
                    break
                try:
                    overdue = partial(self._overdue, candidate.conversation, clients)
                    machine = await self._receive(candidate, stack, strays, overdue)
                    clients.ending = MigrationError("another guest has come here meanwhile")
                    return machine
                except KvmmigError as error:
                    if not self._keep_listening or clients.have_ended:
                        failure = error
                        break
                    if self._on_setback is not None:
                        self._on_setback(error)
        raise failure  # here, because a cancel at that moment would put it into a group with its tasks' own

    def _held(self) -> int:
        return self._reserve.size if self._reserve is not None else 0

    def _overdue(self, conversation: Conversation, clients: Clients) -> MigrationError | None:
        seconds = self._limits().stall_timeout
        if clients.wait:
            seconds = min(seconds, _SILENCE_IN_THE_WAY)
        if conversation.silence < seconds:
            return None
        return MigrationError(f"{conversation.peer} has sent nothing for {seconds:g} s; it keeps its guest")

    async def _receive(
        self,
        candidate: Candidate,
        stack: AsyncExitStack,
        strays: trio.Nursery,
        overdue: Callable[[], KvmmigError | None],
    ) -> Machine:
        """The guest of one source, running if it ran; ``stack`` then has its machine, and its channel."""
        conversation = self._conversation = candidate.conversation
        async with candidate.stack as own:
            if self._on_connected is not None:
                self._on_connected()
            try:
                machine = await self._receive_guest(candidate, own, overdue)
            except BaseException as error:
                await conversation.refuse(error)
                raise
            stack.push_async_exit(own.pop_all())
        strays.start_soon(self._say_goodbye, conversation)
        return machine

    async def _receive_guest(
        self, candidate: Candidate, stack: AsyncExitStack, overdue: Callable[[], KvmmigError | None]
    ) -> Machine:
        conversation, description = candidate.conversation, candidate.description
        started = perf_counter()
        machine = await stack.enter_async_context(
            Machine.open(
                description.config(),
                output=self._output,
                description=description,
                reserve=self._reserve,
            )
        )
        receiver = self._receiver = Receiver(conversation, machine)
        conversation.note_progress()
        sections, end = await conversation.work(partial(receiver.receive, candidate.first), overdue=overdue)
        machine.memory.check_populated()
        await machine.apply(sections)
        await self._wait_for_go(conversation)
        if end.running:
            await machine.start()
        self.total_time = perf_counter() - started
        if self._on_here is not None:
            self._on_here(machine)
        return machine

    async def _wait_for_go(self, conversation: Conversation) -> None:
        """Until "go" is here the guest is the source's.

        A source that has heard "ready" says it at once, or has died: if it is silent then, and has said "go"
        on a way that lost it, it stays paused there, and its operator finds out that it does not run here.
        """
        seconds = self._limits().handover_timeout

        async def wait() -> None:
            await conversation.say(stream.Kind.READY)
            conversation.note_progress()
            await conversation.event()
            if not conversation.channel.two_way:
                await conversation.end_of_stream()

        def overdue() -> MigrationError | None:
            if not conversation.channel.two_way or conversation.silence < seconds:
                return None
            return MigrationError(f'{conversation.peer} did not say "go" within {seconds:g} s')

        await conversation.work(wait, overdue=overdue)

    async def _say_goodbye(self, conversation: Conversation) -> None:
        """The guest runs here now, whatever becomes of the channel."""
        await conversation.say_goodbye()
        self._gone.set()


def _as_function(limits: Limits | Callable[[], Limits]) -> Callable[[], Limits]:
    return (lambda: limits) if isinstance(limits, Limits) else limits
