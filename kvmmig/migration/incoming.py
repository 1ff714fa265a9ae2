"""The other side: a guest arrives through a channel and goes on running here.

The machine is built from the stream's hello, exactly as the source describes it, and its pages are received
straight into guest memory. It starts only when the source has said "go" (two-way), or when the stream was
whole to its last byte (one-way). Until then whatever happens ends it, and the source keeps the guest.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter

import numpy as np
import trio

from kvmmig.errors import KvmmigError, MigrationError, StreamError, TransportError
from kvmmig.kvm import System
from kvmmig.machine.config import MachineDescription
from kvmmig.machine.machine import Machine
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageSet, Runs
from kvmmig.machine.state import StateSection
from kvmmig import stream
from kvmmig.stream.cursor import Cursor
from kvmmig.migration.policy import Limits
from kvmmig.migration.stall_meter import Durations, StallMeter
from kvmmig.transport import Channel

#: Runs shorter than this on average come through one buffer and are scattered: cheaper than many reads.
_SCATTER_BELOW = 16
#: Pages whose copying takes longer than a hop into a thread.
_WORTH_A_THREAD = 128
#: How long a refused source may take to read why.
_LAST_WORDS = 0.5
_LAST_WORDS_OF_A_CANCEL = 0.05


class IncomingMigration:
    """Receives one guest from one channel::

    async with listener, await listener.accept() as channel:
        incoming = IncomingMigration(channel)
        async with incoming.machine() as machine:
            ...  # it runs
    """

    def __init__(
        self,
        channel: Channel,
        *,
        output: Callable[[bytes], None] | None = None,
        limits: Limits | None = None,
        on_populate: Callable[[int, int], None] | None = None,
        on_here: Callable[[Machine], None] | None = None,
    ) -> None:
        """``output`` gets what the guest writes to its serial port; ``on_populate`` bytes done and in all.

        ``on_here`` gets the machine when the guest is here, before the source is told so. It must be quick
        and not raise.
        """
        self._channel = channel
        self._output = output
        self._limits = limits if limits is not None else Limits()
        self._on_populate = on_populate
        self._on_here = on_here
        self._decoder = stream.Decoder(stream.Direction.FORWARDS)
        self._encoder = stream.Encoder(stream.Direction.BACKWARDS)
        self._cursor = Cursor()
        self._meter = StallMeter()
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
        """The machine, once it has arrived; it runs if it ran at the source, else it is yet to be started.

        Raises `StreamError` for bytes that are no whole stream, `StateMismatch` for a guest that can't live
        here, `MigrationError` where the source gave up, `TransportError` where the channel broke. After any
        of them, and after a cancel, nothing is left here, and a source that can listen has been told why.
        The channel is closed when the guest has arrived.
        """
        async with AsyncExitStack() as stack:
            with self._meter:
                try:
                    machine = await self._arrive(stack)
                except BaseException as error:
                    patience = _LAST_WORDS if isinstance(error, KvmmigError) else _LAST_WORDS_OF_A_CANCEL
                    with trio.move_on_after(patience, shield=True):
                        await self._last_words(error)
                    self._channel.abort()
                    raise
            yield machine

    async def _arrive(self, stack: AsyncExitStack) -> Machine:
        hello = await self._hello()
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
        two_way = self._channel.features.two_way
        if two_way:
            await self._send(self._encoder.preamble() + self._encoder.signal(stream.Kind.ACCEPT))
        sections, end = await self._receive_guest(machine)
        await machine.apply(sections)
        if two_way:
            await self._send(self._encoder.signal(stream.Kind.READY))
        # Until "go" is here the guest is the source's. No limit of time: only the source knows if it was sent
        await self._event()
        if not two_way and await self._channel.receive_some(memoryview(bytearray(1))):
            raise StreamError(f"the stream goes on behind its end at byte {self.received_bytes}")
        if end.running:
            await machine.start()
        self.total_time = perf_counter() - started
        if self._on_here is not None:
            self._on_here(machine)
        # The guest runs here now, whatever becomes of the channel.
        with contextlib.suppress(TransportError):
            if two_way:
                await self._send(self._encoder.signal(stream.Kind.RUNNING))
            await self._channel.aclose()
        return machine

    async def _hello(self) -> stream.Hello:
        with trio.move_on_after(self._limits.setup_timeout):
            event = await self._event()
            assert isinstance(event, stream.Hello)  # the decoder lets nothing else come first
            return event
        raise MigrationError(f"{self._channel.peer} sent no hello within {self._limits.setup_timeout:g} s")

    async def _receive_guest(self, machine: Machine) -> tuple[list[StateSection], stream.End]:
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
        if not self._channel.features.two_way or isinstance(error, TransportError):
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


def _span(runs: Runs) -> tuple[int, int]:
    return int(runs[0, 0]), int(runs[-1].sum())
