"""Real guests saved as images and mapped again, and images that must not run."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import kvmmig
from kvmmig import guests
from kvmmig.errors import ImageError, MigrationError
from kvmmig.image import MEMORY_AT
from kvmmig.image.reading import open_image, reader, stored_parts
from kvmmig.machine import Machine, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import MaxRounds
from kvmmig.testing.machine import FakeMachine

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
