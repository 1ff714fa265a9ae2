"""What the host and its devices write into guest memory while the guest moves is not lost."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kvmmig.machine import Entry, Machine, MachineConfig, Program, State, StateSection
from kvmmig.machine.config import MachineDescription
from kvmmig.machine.cpu import Ending
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Continue, Decision, Policy, RoundFigures, Stop
from kvmmig.transport import TransportURI, transport_for
from tests.assembling import assembled

pytestmark = pytest.mark.kvm

MEMORY = 16 << 20
ROUNDS = 3
# Pages that the guest never touches: one that is written at every moment, then one for each.
SHARED = 8 << 20
MOMENTS = (
    "before tracking begins",
    "before the first dirty log",
    "after round 0",
    "after round 1",
    "after round 2",
    "before the guest is paused",
    "when the guest is paused",
    "when its state is captured",
)
Write = Callable[[str], None]


class Watched:
    """A machine whose host writes to guest memory at each of these moments of its migration."""

    def __init__(self, machine: Machine, write: Write) -> None:
        self._machine = machine
        self.happens = write

    @property
    def memory(self) -> GuestMemory:
        return self._machine.memory

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def description(self) -> MachineDescription:
        return self._machine.description

    @property
    def thread_ids(self) -> Sequence[int]:
        return self._machine.thread_ids

    @property
    def exits(self) -> Mapping[str, int]:
        return self._machine.exits

    def dirty_tracker(self) -> DirtyTracker:
        return WatchedTracker(self._machine.dirty_tracker(), self.happens)

    async def pause(self) -> None:
        self.happens("before the guest is paused")
        await self._machine.pause()
        self.happens("when the guest is paused")

    async def resume(self) -> None:
        await self._machine.resume()

    async def capture(self) -> Sequence[StateSection]:
        sections = await self._machine.capture()
        self.happens("when its state is captured")
        return sections

    async def forget_capture(self) -> None:
        await self._machine.forget_capture()

    async def wait(self) -> Ending:
        return await self._machine.wait()

    def mark_moved(self) -> None:
        self._machine.mark_moved()

    async def throttle(self, share: float) -> None:
        await self._machine.throttle(share)


class WatchedTracker(DirtyTracker):
    def __init__(self, tracker: DirtyTracker, write: Write) -> None:
        self._tracker = tracker
        self._happens = write

    def start(self) -> None:
        self._happens("before tracking begins")
        self._tracker.start()
        self._happens("before the first dirty log")

    def collect(self, into: PageSet) -> int:
        return self._tracker.collect(into)

    def stop(self) -> None:
        self._tracker.stop()


class SomeRounds(Policy):
    """So many rounds, and then the stop. The dirty log of a round was read just before it is asked."""

    def __init__(self, write: Write) -> None:
        self._happens = write

    def decide(self, figures: RoundFigures) -> Decision:
        self._happens(f"after round {figures.round}")
        return Stop() if figures.round == ROUNDS - 1 else Continue()


def busy_guest() -> Program:
    """Writes to a page of its own for ever, so that the dirty log is never empty."""
    source = "again: inc qword [0x200000]\njmp again\n"
    return Program("busy", Entry.LONG64, assembled(source, bits=64, origin=0x100000))


@asynccontextmanager
async def moved(where: TransportURI, write: Callable[[GuestMemory, str], None]) -> AsyncIterator[Machine]:
    """A guest that has moved while its host called ``write`` with each of the moments."""
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=MEMORY)) as source:
            await source.load(busy_guest())
            source.memory.write(SHARED, b"old" * 100)
            await source.start()

            def happens(moment: str) -> None:
                write(source.memory, moment)

            def migration(uri: TransportURI) -> OutgoingMigration:
                transport = transport_for(uri)
                return OutgoingMigration(Watched(source, happens), transport, policy=SomeRounds(happens))

            def send(uri: TransportURI) -> None:
                nursery.start_soon(migration(uri).run)

            live = where.scheme == "tcp"
            if not live:
                await migration(where).run()
            async with trio.open_nursery() as nursery:
                incoming = IncomingMigration(transport_for(where), on_listening=send if live else None)
                async with incoming.machine() as machine:
                    yield machine


@pytest.fixture(params=["tcp", "file", "pipe"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> TransportURI:
    if request.param == "tcp":
        return TransportURI("tcp", "127.0.0.1:0")
    return TransportURI(request.param, f"{tmp_path}/guest.img")


def place(moment: str) -> int:
    """Where the host writes at this moment: the last 100 bytes of a page and the first of the next."""
    return SHARED + (2 + 2 * MOMENTS.index(moment)) * PAGE_SIZE - 100


async def test_the_hosts_own_writes_arrive_whenever_they_happen_until_the_state_is_captured(
    where: TransportURI,
) -> None:
    happened: list[str] = []

    def write(memory: GuestMemory, moment: str) -> None:
        happened.append(moment)
        memory.write(place(moment), moment.encode().ljust(200, b"."))
        memory.write(SHARED, moment.encode().ljust(200, b"."))

    async with moved(where, write) as machine:
        assert happened == list(MOMENTS)
        for moment in MOMENTS:
            assert machine.memory.read(place(moment), 200) == moment.encode().ljust(200, b"."), moment
        assert machine.memory.read(SHARED, 200) == MOMENTS[-1].encode().ljust(200, b".")


class Device(threading.Thread):
    """Writes numbers to 64 pages in turn, as fast as it can, until it is told to rest."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(name="device")
        self._memory = memory
        self._resting = threading.Event()
        self.last: dict[int, int] = {}

    def run(self) -> None:
        number = 0
        while not self._resting.is_set():
            number += 1
            gpa = SHARED + number % 64 * PAGE_SIZE
            self._memory.write(gpa, number.to_bytes(8, "little"))
            self.last[gpa] = number

    def rest(self) -> None:
        self._resting.set()
        self.join()


async def test_a_device_that_writes_in_a_thread_of_its_own_while_the_guest_runs_loses_nothing(
    where: TransportURI,
) -> None:
    devices: list[Device] = []

    def write(memory: GuestMemory, moment: str) -> None:
        if moment == "before the first dirty log":
            devices.append(Device(memory))
            devices[0].start()
        elif moment == "when the guest is paused":  # what nobody asks for anything comes to rest
            devices[0].rest()

    try:
        async with moved(where, write) as machine:
            (device,) = devices
            assert len(device.last) == 64
            for gpa, number in device.last.items():
                assert int.from_bytes(machine.memory.read(gpa, 8), "little") == number
    finally:
        for device in devices:
            device.rest()


async def test_what_is_written_through_a_view_is_seen_by_no_migration(where: TransportURI) -> None:
    """As its docstring says; and it shows that the other tests' writes arrive because they are tracked."""

    def write(memory: GuestMemory, moment: str) -> None:
        memory.view(place(moment), 4)[:] = b"lost"

    async with moved(where, write) as machine:
        for moment in MOMENTS[2:]:
            assert machine.memory.read(place(moment), 4) == bytes(4), moment
        for moment in MOMENTS[:2]:  # the first round sends all of memory, whoever wrote it
            assert machine.memory.read(place(moment), 4) == b"lost", moment
