"""Real guests saved as images and mapped again, and images that must not run."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvmmig
from kvmmig import guests
from kvmmig.errors import ImageError, MigrationError
from kvmmig.image import MEMORY_AT, OpenImage
from kvmmig.image.reading import open_image, reader, stored_parts
from kvmmig.machine import Machine, State
from kvmmig.machine.memory import MEMORY_UNIT
from kvmmig.machine.state import StateSection
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds, Stopped
from kvmmig.testing.machine import FakeMachine
from kvmmig.transport import RandomAccessChannel, Transport, TransportURI

MIB = 1 << 20


@asynccontextmanager
async def running() -> AsyncIterator[Machine]:
    """A dirtier that has printed something."""
    letter, token = trio.Event(), trio.lowlevel.current_trio_token()

    def output(_: bytes) -> None:
        token.run_sync_soon(letter.set, idempotent=True)

    settings = {"hot": "1MiB"}
    async with kvmmig.open_machine("dirtier", memory=16 * MIB, settings=settings, output=output) as machine:
        await machine.start()
        with trio.fail_after(60):
            await letter.wait()
        yield machine


async def is_right(machine: Machine) -> bool:
    await machine.pause()
    result = await trio.to_thread.run_sync(guests.check_machine, machine)
    assert result is not None
    return result.ok


def is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        read = reader(file.fileno())
        return list(open_image(file.fileno()).verify(read, stored_parts(file.fileno()))) == []


@pytest.mark.kvm
@pytest.mark.parametrize("way", ["file:{}", "pipe:{}", "throttle+file:{}?throttle.rate=1GB/s"])
async def test_an_image_opens_through_every_way_that_reads_files(way: str, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    async with running() as machine:
        await OutgoingMigration(machine, f"file:{path}", policy=MaxRounds(3)).run()
    assert is_whole(path)
    async with IncomingMigration(way.format(path)).machine() as machine:
        assert machine.state is State.RUNNING
        assert await is_right(machine)


@pytest.mark.kvm
async def test_a_guest_that_is_only_saved_goes_on_and_may_be_saved_onto_what_it_runs_from(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.img"
    async with running() as machine:
        figures = await OutgoingMigration(machine, f"file:{path}", keep_running=True).run()
        assert machine.state is State.RUNNING
        assert figures.downtime is not None
        assert await is_right(machine)
    for _ in range(2):  # the guest runs from the older file, which has no name any more
        async with IncomingMigration(f"file:{path}").machine() as machine:
            before = path.stat().st_ino
            await OutgoingMigration(machine, f"file:{path}", keep_running=True).run()
            assert path.stat().st_ino != before
            assert is_whole(path)
            assert await is_right(machine)


@pytest.mark.kvm
async def test_what_was_read_ahead_is_the_guests_own_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    async with running() as machine:
        await OutgoingMigration(machine, f"file:{path}").run()
    done = trio.Event()

    def progress(count: int, total: int) -> None:
        if count == total:
            done.set()

    incoming = IncomingMigration(f"file:{path}", prefault=True, on_prefault=progress)
    async with incoming.machine() as machine:
        with trio.fail_after(60):
            await done.wait()
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), bytes(16 * MIB), MEMORY_AT)
            file.truncate(0)
        assert machine.state is State.RUNNING
        assert await is_right(machine)


@pytest.mark.kvm
async def test_damage_that_is_found_while_reading_ahead_stops_the_guest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.img"
    async with running() as machine:
        await OutgoingMigration(machine, f"file:{path}").run()
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"damage", MEMORY_AT + 12 * MIB)
    assert not is_whole(path)
    paused = trio.Event()
    async with IncomingMigration(f"file:{path}", prefault=True).machine() as machine:
        machine.on_state(lambda state: paused.set() if state is State.PAUSED else None)
        with trio.fail_after(60), caplog.at_level(logging.ERROR):
            if machine.state is State.RUNNING:
                await paused.wait()
    assert "pages 3072 to 3135 are damaged" in caplog.text
    with pytest.raises(ImageError, match=r"a\.img: the pages 3072 to 3135 are damaged"):
        async with IncomingMigration(f"pipe:{path}").machine():
            pass


class Access(RandomAccessChannel):
    """A file in memory; ``on_write(room)`` says how many bytes are accepted, 0 blocks until cancelled.

    What was accepted is read from its buffer as late as it may be: when the channel settles.
    """

    peer = "a test's file"

    def __init__(self, on_write: Callable[[int], int]) -> None:
        self.data = bytearray()
        self.closed = False
        self._on_write = on_write
        self._accepted: list[tuple[int, memoryview]] = []

    async def write_some(self, pieces: Sequence[tuple[int, memoryview]]) -> int:
        await trio.lowlevel.checkpoint()
        count = left = self._on_write(sum(len(data) for _, data in pieces))
        if not left:
            await trio.sleep_forever()
        for offset, data in pieces:
            part = data[:left]
            for at, other in self._accepted:
                assert offset + len(part) <= at or at + len(other) <= offset, "two writes to one place"
            if part:
                self._accepted.append((offset, part))
            left -= len(part)
        return count

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()
        for offset, data in self._accepted:
            self.data.extend(bytes(max(offset + len(data) - len(self.data), 0)))
            self.data[offset : offset + len(data)] = data
        self._accepted.clear()

    async def flush(self) -> None:
        await self.settle()

    def abort(self) -> None: ...

    async def aclose(self) -> None:
        await self.settle()
        self.closed = True


class Given(Transport):
    """Gives the channel that the test made."""

    stores = random_access = True

    def __init__(self, channel: Access) -> None:
        super().__init__(TransportURI("given", "x"))
        self._channel = channel

    @asynccontextmanager
    async def connect_random_access(self) -> AsyncIterator[RandomAccessChannel]:
        yield self._channel

    def connect(self) -> NoReturn:
        raise NotImplementedError

    def listen(self) -> NoReturn:
        raise NotImplementedError


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.integers(0, 2**32), st.integers(0, 5), st.booleans(), st.booleans())
def test_the_images_memory_is_the_guests_whatever_is_written_when(
    seed: int, rounds: int, forced: bool, keep: bool
) -> None:
    """Random prefixes, blocked steps, pages written and zeroed all the while, read as late as can be."""

    async def main() -> None:
        chance = random.Random(seed)
        machine = FakeMachine(3 * MEMORY_UNIT)
        n_pages = machine.memory.n_pages

        def on_write(room: int) -> int:
            if machine.state is State.RUNNING:
                for _ in range(chance.randrange(6)):
                    machine.write(chance.randrange(n_pages), chance.choice([0, 0, 1, 7, 255]))
            return chance.choice([0, 4096, chance.randint(1, room // 4096) * 4096, room, room])

        for page in range(0, n_pages, chance.randint(1, 9)):
            machine.write(page, page % 255 + 1)
        channel = Access(on_write)
        limits = Limits(step=0.0005, timeout=0.002 if forced else None, on_timeout="force")
        policy = MaxRounds(rounds) if rounds else Stopped()
        migration = OutgoingMigration(
            machine, Given(channel), policy=policy, limits=limits, keep_running=keep
        )
        at_stop = bytearray()
        capture = machine.capture

        async def capture_too() -> Sequence[StateSection]:
            at_stop.extend(machine.memory.pages(0, n_pages))
            return await capture()

        machine.capture = capture_too  # type: ignore[method-assign]  # memory as it is when all stands still
        await migration.run()
        data = bytes(channel.data)
        opened = OpenImage(lambda offset, length: data[offset : offset + length], len(data))
        memory = data[MEMORY_AT : opened.layout.page_map_at]
        assert memory == at_stop
        assert list(opened.verify(lambda at, length: data[at : at + length], [(0, len(data))])) == []
        assert channel.closed
        assert machine.state is (State.RUNNING if keep else State.MOVED)
        assert not machine.tracker.on
        machine.memory.close()

    trio.run(main)


async def test_a_torn_image_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    await OutgoingMigration(FakeMachine(), f"file:{path}").run()
    whole = path.read_bytes()
    for data in (whole[:20], whole[:-1], whole + b"x", whole[:100] + b"x" + whole[101:]):
        path.write_bytes(data)
        with pytest.raises(ImageError, match=r"a\.img: it.* (cut|damaged)"):
            async with IncomingMigration(f"file:{path}").machine():
                pass


async def test_a_guest_can_go_on_only_where_it_is_stored() -> None:
    with pytest.raises(MigrationError, match="stores nothing"):
        OutgoingMigration(FakeMachine(), "tcp:127.0.0.1:4444", keep_running=True)


async def test_a_guest_that_ends_after_it_was_saved_does_not_undo_the_save(tmp_path: Path) -> None:
    machine = FakeMachine()
    resume = machine.resume

    async def resume_and_end() -> None:
        await resume()
        machine.end(kvmmig.Ending("exit"))

    machine.resume = resume_and_end  # type: ignore[method-assign]  # the guest ends the moment that it may
    path = tmp_path / "a.img"
    await OutgoingMigration(machine, f"file:{path}", keep_running=True).run()
    assert is_whole(path)
