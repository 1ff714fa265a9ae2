"""The other side: a guest arrives through a channel and goes on running here.

The machine is built from the stream's hello, exactly as the source describes it, and its pages are received
straight into guest memory. It starts only when the source has said "go" (two-way), or when the stream was
whole to its last byte (one-way). Until then whatever happens leaves the guest with the source; and where
sources connect, this side goes back to listening for the next one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from time import perf_counter
from typing import TypeVar

import trio

from kvmmig import stream
from kvmmig.errors import KvmmigError, MigrationError
from kvmmig.machine.cpu import ExitHook
from kvmmig.machine.machine import Machine
from kvmmig.machine.populating import Reserve
from kvmmig.migration.clients import Candidate, Clients, accepting, check_hello
from kvmmig.migration.conversation import Conversation
from kvmmig.migration.events import RecordedEvent
from kvmmig.migration.policy import Limits
from kvmmig.migration.receiving import Receiver
from kvmmig.migration.recorder import Recorder
from kvmmig.migration.restoring import Restored, look_for_image, reading_ahead, restored_machine
from kvmmig.migration.stall_meter import Durations, StallMeter
from kvmmig.migration.welcome import Welcome
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.transport.supervision import GuardedListener, listening
from kvmmig.transport.toolkit import own_tasks, unixsockets

T = TypeVar("T")

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
        on_exit: ExitHook | None = None,
        limits: Limits | Callable[[], Limits] | None = None,
        welcome: Welcome | None = None,
        keep_listening: bool = True,
        on_listening: Callable[[TransportURI], None] | None = None,
        on_connected: Callable[[], None] | None = None,
        reserve: Reserve | None = None,
        on_setback: Callable[[KvmmigError], None] | None = None,
        on_here: Callable[[Machine], None] | None = None,
        start: bool = True,
        on_event: Callable[[RecordedEvent], None] | None = None,
        record: str | os.PathLike[str] | None = None,
        strays: trio.Nursery | None = None,
        prefault: bool = False,
        on_prefault: Callable[[int, int], None] | None = None,
    ) -> None:
        """``transport`` may be a URI. ``output`` and ``on_exit`` are as for `Machine.open`.

        ``reserve`` is memory for the guest that is there already; whoever made it closes it.

        ``welcome`` says which guests may come, and from whom; ``limits`` bounds a source that is silent, and
        may be a function that says how they are now.

        Where sources connect, what one of them fails with does not end this: it goes on listening, and only
        ``on_setback`` is told of it, for one that had begun to send its guest. Without ``keep_listening`` the
        first source that says a whole hello decides. Who says none is passed over in either case.

        ``on_listening`` gets where it listens in fact; ``on_connected`` is told that a source has begun;
        ``on_here`` gets the machine when the guest is here, before the source is told so; ``on_event`` all
        that a record has, and ``record`` is a file to append that to (docs/record.md). All must be quick and
        not raise. What a channel does that can't be ended is left behind in ``strays``, a nursery that
        outlives this; without one, the end of `machine` waits for it. Without ``start`` it is paused here.

        A guest that is mapped from an image runs before its pages are read. ``prefault`` has them read, and
        checked, while it runs; ``on_prefault`` is told bytes done and bytes in all.
        """
        self._transport = transport if isinstance(transport, Transport) else transport_for(transport)
        self._output = output
        self._on_exit = on_exit
        self._limits = _as_function(limits if limits is not None else Limits())
        self._welcome = welcome if welcome is not None else Welcome()
        self._keep_listening = keep_listening
        self._on_listening = on_listening
        self._on_connected = on_connected
        self._reserve = reserve
        self._on_setback = on_setback
        self._on_here = on_here
        self._start = start
        self._strays = strays
        self._prefault = prefault
        self._on_prefault = on_prefault
        self._recorder = Recorder("destination", on_event, record)
        self._started = perf_counter()  # then, when a guest begins to come
        self._conversation: Conversation | None = None
        self._receiver: Receiver | None = None
        self._restored: Restored | None = None
        self._meter = StallMeter(self._recorder.turn if self._recorder.tell is not None else None)
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
    def mapped(self) -> bool:
        """Whether it runs from an image that is mapped: its pages come when they are used."""
        return self._restored is not None and self._restored.fd is not None

    @property
    def received_bytes(self) -> int:
        """Bytes taken from the channel; of an image that is mapped, none were."""
        if self._restored is not None:
            return 0 if self.mapped else self._restored.image.header.size
        return self._conversation.decoder.position if self._conversation is not None else 0

    @property
    def received_pages(self) -> int:
        """Pages that came with their bytes."""
        if self._restored is not None:
            return self._restored.image.header.data_pages
        return self._receiver.received_pages if self._receiver is not None else 0

    @property
    def zero_pages(self) -> int:
        """Pages that were only said to be zero."""
        if self._restored is not None:
            return self._restored.zero_pages
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
            await stack.enter_async_context(self._recorder.recording())
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
            conversation = self._conversation = Conversation(channel, strays)
            try:
                if (found := await self._image(conversation)) is not None:
                    machine = await self._restore(found, conversation, own)
                    stack.push_async_exit(own.pop_all())
                    strays.start_soon(self._say_goodbye, conversation)
                    return machine
                hello = await self._first_words(conversation, conversation.event)
                assert isinstance(hello, stream.Hello)  # the decoder lets nothing else come first
                description = await check_hello(hello, self._welcome, self._held())
                await conversation.work(lambda: conversation.say(stream.Kind.ACCEPT))
                first = await conversation.work(conversation.event)
            except BaseException as error:
                await self._refuse(conversation, error)
                raise
            candidate = Candidate(conversation, description, first, own.pop_all())
        return await self._receive(candidate, stack, strays, lambda: None)

    async def _image(self, conversation: Conversation) -> Restored | None:
        look = partial(look_for_image, conversation.channel, conversation.decoder)
        return await self._first_words(conversation, look)

    async def _first_words(self, conversation: Conversation, call: Callable[[], Awaitable[T]]) -> T:
        seconds = self._limits().setup_timeout
        with trio.move_on_after(seconds):
            return await conversation.work(call)
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
                await self._refuse(conversation, error)
                raise
            stack.push_async_exit(own.pop_all())
        strays.start_soon(self._say_goodbye, conversation)
        return machine

    async def _receive_guest(
        self, candidate: Candidate, stack: AsyncExitStack, overdue: Callable[[], KvmmigError | None]
    ) -> Machine:
        conversation, description = candidate.conversation, candidate.description
        self._begin(conversation.decoder.identity, description.encode())
        self._recorder.phase("populate")
        machine = await stack.enter_async_context(
            Machine.open(
                description.config(),
                output=self._output,
                on_exit=self._on_exit,
                description=description,
                reserve=self._reserve,
            )
        )
        receiver = self._receiver = Receiver(conversation, machine, self._recorder)
        self._recorder.phase("receive")
        conversation.note_progress()
        sections, end = await conversation.work(partial(receiver.receive, candidate.first), overdue=overdue)
        self._recorder.phase("apply")
        machine.memory.check_populated()
        await machine.apply(sections)
        self._recorder.phase("ready")
        await self._wait_for_go(conversation)
        await self._let_run(machine, running=end.running)
        if self._on_here is not None:
            self._on_here(machine)
        return machine

    async def _restore(self, found: Restored, conversation: Conversation, stack: AsyncExitStack) -> Machine:
        """As `_receive_guest`, where it is an image that begins there."""
        header = found.image.header
        self._begin(found.image.identity, bytes(header.machine))
        self._recorder.phase("apply")
        opening = restored_machine(
            found, conversation, self._welcome, output=self._output, on_exit=self._on_exit
        )
        machine = await stack.enter_async_context(opening)
        self._restored = found
        await self._let_run(machine, running=header.running)
        if self._prefault:
            await stack.enter_async_context(reading_ahead(found, machine, self._on_prefault))
        if self._on_here is not None:
            self._on_here(machine)
        return machine

    def _begin(self, identity: bytes, description: bytes) -> None:
        self._started = perf_counter()
        self._recorder.begun(str(self._transport.uri), identity, description)

    async def _let_run(self, machine: Machine, *, running: bool) -> None:
        if running and self._start:
            await machine.start()
        self._recorder.here(runs=running)
        self.total_time = perf_counter() - self._started

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
        self._recorder.ended_destination(self)
        self._gone.set()

    async def _refuse(self, conversation: Conversation, error: BaseException) -> None:
        await conversation.refuse(error)
        self._recorder.ended_destination(self, error)


def _as_function(limits: Limits | Callable[[], Limits]) -> Callable[[], Limits]:
    return (lambda: limits) if isinstance(limits, Limits) else limits
