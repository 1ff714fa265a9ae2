"""The other side: a guest arrives through a channel and goes on running here.

The machine is built from the stream's hello, exactly as the source describes it, and its pages are received
straight into guest memory. It starts only when the source has said "go" (two-way), or when the stream was
whole to its last byte (one-way). Until then whatever happens ends it, and the source keeps the guest.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np
import trio

from kvmmig import stream
from kvmmig.errors import (
    KvmError,
    KvmmigError,
    MigrationError,
    StateMismatch,
    StreamError,
    TransportError,
)
from kvmmig.kvm import System
from kvmmig.machine.config import MachineDescription
from kvmmig.machine.machine import Machine
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageSet, Runs
from kvmmig.machine.state import StateSection
from kvmmig.migration.peer import name_sender
from kvmmig.migration.policy import Limits
from kvmmig.migration.stall_meter import Durations, StallMeter
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.supervision import listening, supervised
from kvmmig.transport.toolkit import own_tasks

T = TypeVar("T")

#: Runs shorter than this on average come through one buffer and are scattered: cheaper than many reads.
_SCATTER_BELOW = 16
#: Pages whose copying takes longer than a hop into a thread.
_WORTH_A_THREAD = 128
#: How long a refused source may take to read why.
_LAST_WORDS = 0.5
_LAST_WORDS_OF_A_CANCEL = 0.05
#: Seconds that the channel has for its orderly end once the guest runs.
_GOODBYE = 10.0


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
        limits: Limits | None = None,
        on_listening: Callable[[TransportURI], None] | None = None,
        on_connected: Callable[[], None] | None = None,
        on_populate: Callable[[int, int], None] | None = None,
        on_here: Callable[[Machine], None] | None = None,
        start: bool = True,
        strays: trio.Nursery | None = None,
    ) -> None:
        """``transport`` may be a URI. ``output`` gets what the guest writes to its serial port.

        ``on_listening`` gets where it listens in fact; ``on_connected`` is told that a source is there;
        ``on_populate`` bytes done and in all; ``on_here`` gets the machine when the guest is here, before the
        source is told so. All must be quick and not raise. Without ``start`` the guest is yet to be started
        then. What a channel does that can't be ended is left behind in ``strays``, a nursery that outlives
        this; without one, the end of `machine` waits for it.
        """
        self._transport = transport if isinstance(transport, Transport) else transport_for(transport)
        self._output = output
        self._limits = limits if limits is not None else Limits()
        self._on_listening = on_listening
        self._on_connected = on_connected
        self._on_populate = on_populate
        self._on_here = on_here
        self._start = start
        self._strays = strays
        self._channel: GuardedChannel
        self._decoder = stream.Decoder(stream.Direction.FORWARDS)
        self._encoder = stream.Encoder(stream.Direction.BACKWARDS)
        self._cursor = stream.Cursor()
        self._meter = StallMeter()
        self._gone = trio.Event()  # all has been said to the source
        #: Who sends it; empty before it is connected.
        self.peer = ""
        #: What the user should know although it is no error.
        self.notices: tuple[str, ...] = ()
        #: Pages that came with their bytes.
        self.received_pages = 0
        #: Pages that were only said to be zero.
        self.zero_pages = 0
        #: Seconds from the hello to the guest's start.
        self.total_time: float | None = None

    @property
    def received_bytes(self) -> int:
        """Bytes taken from the channel."""
        return self._decoder.position

    @property
    def turns(self) -> Durations:
        """The turns of the event loop while receiving."""
        return self._meter.turns.snapshot()

    @asynccontextmanager
    async def machine(self) -> AsyncIterator[Machine]:
        """Listen, receive one guest, and give its machine; it runs if it ran at the source and is to be
        started here, else it is yet to be started. Call it once.

        Raises `ConnectFailed` where nobody can connect, `StreamError` for bytes that are no whole stream,
        `StateMismatch` for a guest that can't live here, `MigrationError` where the source gave up,
        `ChannelBroken` where the channel broke. After any of them, and after a cancel, nothing is left here,
        and a source that can listen has been told why. The source hears that the guest runs, and the channel
        is closed, while it runs already: nothing that the channel does can end it.
        """
        async with AsyncExitStack() as stack:
            strays = self._strays
            if strays is None:
                strays = await stack.enter_async_context(own_tasks())
            await self._connect(stack, strays)
            with self._meter:
                try:
                    machine = await self._receive(stack, strays)
                except BaseException as error:
                    patience = _LAST_WORDS if isinstance(error, KvmmigError) else _LAST_WORDS_OF_A_CANCEL
                    with trio.move_on_after(patience, shield=True):
                        with contextlib.suppress(KvmmigError):
                            await self._work(strays, partial(self._last_words, error))
                    self._channel.abort()
                    if isinstance(error, StreamError | StateMismatch) or type(error) is KvmError:
                        name_sender(error, self.peer)
                    raise
            yield machine
            await self._gone.wait()

    async def _connect(self, stack: AsyncExitStack, strays: trio.Nursery) -> None:
        async with listening(self._transport, strays) as listener:
            if self._on_listening is not None:
                self._on_listening(listener.uri)
            self._channel = await stack.enter_async_context(listener.accept())
        self.peer, self.notices = self._channel.peer, self._channel.notices
        if self._on_connected is not None:
            self._on_connected()

    async def _receive(self, stack: AsyncExitStack, strays: trio.Nursery) -> Machine:
        hello = await self._hello(strays)
        started = perf_counter()
        description = MachineDescription.decode(bytes(hello.machine))
        if hello.n_pages * stream.PAGE_SIZE != description.memory:
            raise StreamError(
                f"the hello names {hello.n_pages} pages, but a machine of {description.memory} bytes"
            )
        await trio.to_thread.run_sync(_check_fits, description)
        machine = await stack.enter_async_context(
            Machine.open(
                description.config(),
                output=self._output,
                description=description,
                on_populate=self._on_populate,
            )
        )
        sizes = machine.section_sizes()
        self._decoder.limit_sections(len(sizes), max(sizes.values()), sum(sizes.values()))
        sections, end = await self._work(strays, partial(self._receive_guest, machine, sizes))
        await machine.apply(sections)
        await self._work(strays, self._wait_for_go)
        if end.running and self._start:
            await machine.start()
        self.total_time = perf_counter() - started
        if self._on_here is not None:
            self._on_here(machine)
        strays.start_soon(self._say_goodbye, strays)
        return machine

    async def _work(self, strays: trio.Nursery, call: Callable[[], Awaitable[T]]) -> T:
        return await supervised(call, strays, stuck=self._channel.stuck)

    async def _wait_for_go(self) -> None:
        """Until "go" is here the guest is the source's. No limit of time: only the source knows if it was
        sent."""
        if self._channel.two_way:
            await self._send(self._encoder.signal(stream.Kind.READY))
        await self._event()
        if not self._channel.two_way and await self._channel.receive_some(memoryview(bytearray(1))):
            raise StreamError(f"the stream goes on behind its end at byte {self.received_bytes}")

    async def _say_goodbye(self, strays: trio.Nursery) -> None:
        """The guest runs here now, whatever becomes of the channel."""
        with trio.move_on_after(_GOODBYE), contextlib.suppress(TransportError):
            await self._work(strays, self._goodbye)
        self._channel.abort()
        self._gone.set()

    async def _goodbye(self) -> None:
        if self._channel.two_way:
            await self._send(self._encoder.signal(stream.Kind.RUNNING))
        await self._channel.aclose()

    async def _hello(self, strays: trio.Nursery) -> stream.Hello:
        with trio.move_on_after(self._limits.setup_timeout):
            event = await self._work(strays, self._event)
            assert isinstance(event, stream.Hello)  # the decoder lets nothing else come first
            return event
        raise MigrationError(f"{self._channel.peer} sent no hello within {self._limits.setup_timeout:g} s")

    async def _receive_guest(
        self, machine: Machine, sizes: Mapping[str, int]
    ) -> tuple[list[StateSection], stream.End]:
        if self._channel.two_way:
            await self._send(self._encoder.preamble() + self._encoder.signal(stream.Kind.ACCEPT))
        memory = machine.memory
        sections: list[StateSection] = []
        touched = PageSet(memory.n_pages)  # pages not in it are still as the kernel gave them: zero
        while True:
            match await self._event():
                case stream.Pages(runs, n_pages):
                    await self._receive_pages(memory, runs, n_pages)
                    first, stop = _span(runs)
                    touched.add(first, stop - first)
                    self.received_pages += n_pages
                case stream.Zeros(runs, n_pages):
                    if len(touched.pages(*_span(runs))):
                        await _off_the_loop(n_pages, memory.zero, runs)
                    self.zero_pages += n_pages
                case stream.Section(name, version, data):
                    _check_section(sizes, name, len(data))
                    sections.append(StateSection(name, version, data))
                case stream.End() as end:
                    return sections, end

    async def _receive_pages(self, memory: GuestMemory, runs: Runs, n_pages: int) -> None:
        """Straight into guest memory; where the runs are short, through one buffer."""
        if n_pages >= len(runs) * _SCATTER_BELOW:
            self._decoder.place([memory.pages(first, count) for first, count in runs.tolist()])
            await self._event()
        else:
            data = np.empty((n_pages, stream.PAGE_SIZE // 8), np.uint64)
            self._decoder.place([data.data.cast("B")])
            await self._event()
            await _off_the_loop(n_pages, memory.scatter, runs, data)

    async def _event(self) -> stream.Event:
        while True:
            count = await self._channel.receive_some(self._decoder.buffer())
            if not count:
                self._decoder.end_of_stream()
            event = self._decoder.advance(count)
            if isinstance(event, stream.Fail):
                raise MigrationError(f"{self._channel.peer} gave the migration up: {event.text}")
            if event is not None:
                return event

    async def _send(self, data: bytes) -> None:
        """After a cancel the rest is still in the cursor, and goes before what is sent next."""
        self._cursor.put(data)
        while not self._cursor.empty:
            self._cursor.advance(await self._channel.send_some(self._cursor.head()))

    async def _last_words(self, error: BaseException) -> None:
        """Tell the source why, and let it read that before the connection goes."""
        if not self._channel.two_way or isinstance(error, TransportError):
            return
        text = str(error) if isinstance(error, KvmmigError) else "the destination was stopped"
        with contextlib.suppress(KvmmigError):
            data = self._encoder.preamble() if self._encoder.state is stream.StreamState.PREAMBLE else b""
            await self._send(data + self._encoder.fail(text))
            scratch = memoryview(bytearray(1 << 16))
            while await self._channel.receive_some(scratch):
                pass


async def _off_the_loop(n_pages: int, work: Callable[..., None], *arguments: object) -> None:
    """Do what takes about a microsecond a page: in a thread, where that is longer than the way there."""
    if n_pages < _WORTH_A_THREAD:
        work(*arguments)
    else:
        await trio.to_thread.run_sync(work, *arguments)


def _check_fits(description: MachineDescription) -> None:
    with System.open() as system:
        description.check_fits(system)


def _check_section(sizes: Mapping[str, int], name: str, size: int) -> None:
    if name not in sizes:
        raise StateMismatch(f"this machine has no place for the state section {name!r}")
    if size > sizes[name]:
        raise StateMismatch(f"the state section {name!r} has {size} bytes; it can have {sizes[name]} at most")


def _span(runs: Runs) -> tuple[int, int]:
    return int(runs[0, 0]), int(runs[-1].sum())
