"""Real guests on real KVM, through the built-in transports, in one process."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from kvmmig import guests, stream
from kvmmig.errors import (
    KvmmigError,
    MigrationCancelled,
    MigrationError,
    MigrationRefused,
    StateMismatch,
    StreamError,
    StreamTruncated,
    WrongState,
)
from kvmmig.image import Builder, Piece
from kvmmig.machine import Machine, MachineConfig, State
from kvmmig.machine.cpu import Cpu
from kvmmig.machine.pageset import Batch, PageSet
from kvmmig.machine.state import StateSection
from kvmmig.machine.throttle import SLICE
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import (
    AutoConverge,
    Continue,
    Decision,
    FirstOf,
    Limits,
    MaxRounds,
    Policy,
    RoundFigures,
    Stop,
)
from kvmmig.migration.report import MigrationStatistics
from kvmmig.transport import TransportURI

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SIZE = 32 * MIB


class Letters:
    """What a guest prints, for a test to wait on."""

    def __init__(self) -> None:
        self.text = bytearray()
        self._more = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def __call__(self, data: bytes) -> None:
        self._token.run_sync_soon(self._take, data)

    def _take(self, data: bytes) -> None:
        self.text += data
        self._more.set()
        self._more = trio.Event()

    async def wait_for(self, count: int) -> None:
        """Until the guest has printed so many more characters."""
        goal = len(self.text) + count
        with trio.fail_after(60):
            while len(self.text) < goal:
                await self._more.wait()


@asynccontextmanager
async def running(
    name: str, *, size: int = SIZE, cpus: int = 1, **settings: int | str
) -> AsyncIterator[tuple[Machine, Letters]]:
    """A toy guest that has printed something."""
    letters = Letters()
    program = guests.find(name).program(memory=size, cpus=cpus, settings=settings)
    config = MachineConfig(memory=size, cpus=cpus, name=program.name, parameters=program.parameters)
    async with Machine.open(config, output=letters) as machine:
        await machine.load(program)
        await machine.start()
        await letters.wait_for(1)
        yield machine, letters


async def check(machine: Machine) -> guests.Check:
    with suppress(WrongState):  # a guest that has itself found what is wrong may have ended
        await machine.pause()
    result = await trio.to_thread.run_sync(guests.check_machine, machine)
    assert result is not None
    return result


@asynccontextmanager
async def moved(
    source: Machine, where: str, *, policy: Policy | None = None
) -> AsyncIterator[tuple[Machine, Letters, MigrationStatistics]]:
    """Move a guest: at the same time where both sides live, one after the other where there is a file."""
    letters = Letters()
    done: list[MigrationStatistics] = []

    async def send(uri: str) -> None:
        done.append(await OutgoingMigration(source, uri, policy=policy).run())

    if where.startswith("tcp:"):
        async with trio.open_nursery() as nursery:

            def on_listening(uri: TransportURI) -> None:
                nursery.start_soon(send, str(uri))

            incoming = IncomingMigration(where, output=letters, on_listening=on_listening)
            async with incoming.machine() as machine:
                with trio.fail_after(60):
                    while not done:
                        await letters.wait_for(0)
                        await trio.lowlevel.checkpoint()
                yield machine, letters, done[0]
    else:
        await send(where)
        async with IncomingMigration(where, output=letters).machine() as machine:
            yield machine, letters, done[0]


@pytest.fixture(params=["tcp", "file", "file?direct=off", "pipe", "pipe?direct=off"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    scheme, mark, options = request.param.partition("?")
    return "tcp:127.0.0.1:0" if scheme == "tcp" else f"{scheme}:{tmp_path}/guest.img{mark}{options}"


class UntilWritten(Policy):
    """Four rounds at least, and more where the guest has not come to write yet."""

    def __init__(self) -> None:
        self._written = 0

    def decide(self, figures: RoundFigures) -> Decision:
        self._written += figures.dirty_pages
        return Stop() if figures.round >= 3 and self._written else Continue()


class UntilOld(Policy):
    """Goes on until the guest has written the page that was dropped once more: what was sent of it is old."""

    def __init__(self, machine: Machine, dropped: list[int]) -> None:
        self._machine = machine
        self._dropped = dropped
        self._then: bytes | None = None

    def decide(self, figures: RoundFigures) -> Decision:
        if not self._dropped:
            return Continue()
        now = bytes(self._machine.memory.pages(self._dropped[0], 1))
        self._then = self._then or now
        return Continue() if now == self._then else Stop()


@pytest.mark.parametrize("cpus", [1, 2])
async def test_a_guest_that_writes_all_the_while_moves_and_not_one_page_is_lost(
    where: str, cpus: int
) -> None:
    async with running("dirtier", cpus=cpus, hot="8MiB", stride=2) as (source, _):
        async with moved(source, where, policy=UntilWritten()) as (machine, letters, statistics):
            assert source.state is State.MOVED
            assert machine.state is State.RUNNING
            await letters.wait_for(6)
            result = await check(machine)
            assert result.ok, result.summary
            assert result.pages == (SIZE - 2 * MIB) // 4096
            assert b"FAIL" not in letters.text
            assert len(statistics.rounds) >= 4
            assert any(each.sent_pages for each in statistics.rounds[1:]), "it did write meanwhile"


async def test_every_register_survives(where: str) -> None:
    async with running("registers") as (source, _), moved(source, where) as (_, letters, _):
        await letters.wait_for(5)
        assert set(letters.text.decode()) <= {"r"}


async def test_what_was_typed_but_not_read_moves_too(where: str) -> None:
    async with running("echo") as (source, letters):
        while not letters.text.endswith(b"x"):  # its first acts reset the UART, and drop what was typed
            source.serial.feed(b"x")
            await letters.wait_for(1)
        await source.pause()
        source.serial.feed(b"typed")
        async with moved(source, where) as (machine, echoed, _):
            await machine.start()
            while b"typed" not in echoed.text:
                await echoed.wait_for(1)


async def test_a_guest_that_outruns_the_link_is_kept_from_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long its vCPU runs all the same, and how many pages that saves, depends on the host."""
    held: list[float] = []
    hold = Cpu.hold

    def noted(cpu: Cpu, seconds: float) -> None:
        held.append(seconds)
        hold(cpu, seconds)

    monkeypatch.setattr(Cpu, "hold", noted)
    async with running("dirtier", size=16 * MIB, hot="8MiB") as (source, _):
        policy = FirstOf(AutoConverge(first=0.5, step=0.49), MaxRounds(8))
        limits = Limits(bandwidth=20e6)
        migration = OutgoingMigration(source, "exec:cat > /dev/null?live=off", policy=policy, limits=limits)
        statistics = await migration.run()
    assert statistics.throttle == 0.0, "it is undone"
    assert any("stand still for 99%" in event.what for event in statistics.events)
    assert max(held) == pytest.approx(0.99 * SLICE)


@pytest.mark.slow
async def test_memory_beyond_the_hole_moves_too() -> None:
    async with running("dirtier", size=3328 * MIB, hot="8MiB") as (source, _):
        async with moved(source, "tcp:127.0.0.1:0") as (machine, letters, _):
            await letters.wait_for(2)
            result = await check(machine)
            assert result.ok, result.summary


# -- the proof is a proof ---------------------------------------------------------------------------------


async def test_a_page_that_is_never_sent_again_is_found(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    batches = PageSet.batches
    rounds = itertools.count()
    dropped: list[int] = []

    def without_one(self: PageSet, limit: int, scattered: int | None = None) -> Iterator[Batch]:
        first_round = next(rounds) == 0
        for batch in batches(self, limit, scattered):
            if not first_round and not dropped and len(batch.pages) > 20:
                dropped.append(int(batch.pages[10]))
            if not first_round and dropped:
                yield Batch(batch.first, batch.stop, batch.pages[batch.pages != dropped[0]])
            else:
                yield batch

    write = Builder.write
    seen: set[int] = set()

    def write_without_one(
        self: Builder, first: int, wanted: npt.NDArray[np.bool_], zero: npt.NDArray[np.bool_]
    ) -> list[Piece]:
        if first in seen and not dropped and wanted.sum() > 20:
            dropped.append(first + int(np.flatnonzero(wanted)[10]))
        seen.add(first)
        if dropped and first <= dropped[0] < first + len(wanted):
            wanted[dropped[0] - first] = False
        return write(self, first, wanted, zero)

    monkeypatch.setattr(PageSet, "batches", without_one)
    monkeypatch.setattr(Builder, "write", write_without_one)
    monkeypatch.setattr("kvmmig.image.builder._BRIDGED", 0)  # else it is written with those beside it
    async with running("dirtier", hot="1MiB") as (source, _):
        async with moved(source, where, policy=UntilOld(source, dropped)) as (machine, _, _):
            result = await check(machine)
    assert dropped
    assert not result.ok
    assert any(f"page {dropped[0]:#x} " in fault for fault in result.faults)


async def test_a_page_that_is_never_sent_at_all_is_missed_and_the_source_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = PageSet.batches

    def without_one(self: PageSet, limit: int, scattered: int | None = None) -> Iterator[Batch]:
        for batch in batches(self, limit, scattered):
            yield Batch(batch.first, batch.stop, batch.pages[batch.pages != 1234])

    monkeypatch.setattr(PageSet, "batches", without_one)
    async with running("dirtier", hot="1MiB") as (source, letters):
        assert "1 of the guest's 8192 pages never came" in str(await refused(source))
        await letters.wait_for(2)
        assert (await check(source)).ok


async def test_one_frame_sent_twice_is_refused_and_the_source_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page_runs = stream.Encoder.page_runs
    repeated: list[int] = []

    def twice(
        self: stream.Encoder, runs: stream.Runs, data: Sequence[memoryview], known: bytes
    ) -> list[memoryview]:
        frame = page_runs(self, runs, data, known)
        if not repeated:
            repeated.append(1)
            return frame + frame
        return frame

    monkeypatch.setattr(stream.Encoder, "page_runs", twice)
    async with running("dirtier", hot="1MiB") as (source, letters):
        error = await refused(source)
        assert isinstance(error, MigrationRefused)
        assert "frame 3 should follow" in str(error)
        await letters.wait_for(2)
        assert (await check(source)).ok


# -- what does not fit, breaks, or is cancelled -----------------------------------------------------------


async def refused(source: Machine, through: str = "{}", limits: Limits | None = None) -> KvmmigError:
    """Try to move a guest to a destination of this process; both must fail. ``{}`` is its URI."""
    errors: list[KvmmigError] = []

    async def send(uri: TransportURI) -> None:
        with trio.fail_after(60), pytest.raises(KvmmigError) as caught:
            await OutgoingMigration(source, through.format(uri), limits=limits).run()
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        incoming = IncomingMigration(
            "tcp:127.0.0.1:0",
            keep_listening=False,
            on_listening=lambda uri: nursery.start_soon(send, uri),
        )
        with pytest.raises(KvmmigError):
            async with incoming.machine():
                pytest.fail("it arrived")
    return errors[0]


async def test_a_guest_that_this_host_can_not_run_is_refused_by_name_and_runs_on() -> None:
    async with running("dirtier", hot="1MiB") as (source, letters):
        import msgspec

        everything = [(1, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)]
        source.description = msgspec.structs.replace(source.description, cpuid=everything)
        error = await refused(source)
        assert isinstance(error, MigrationRefused)
        assert "this host's CPU lacks" in str(error)
        assert source.state is State.RUNNING
        await letters.wait_for(2)
        assert (await check(source)).ok


async def test_a_cancelled_save_gives_the_guest_back_and_leaves_no_file(tmp_path: Path) -> None:
    older = tmp_path / "guest.img"
    older.write_bytes(b"an older one")
    for phase in ("rounds", "final", "commit"):
        async with running("dirtier", hot="8MiB") as (source, letters):

            def cancel(now: str) -> None:
                if now == phase:  # noqa: B023 - it ends with the iteration
                    migration.cancel()  # noqa: B023

            migration = OutgoingMigration(source, f"file:{older}", policy=MaxRounds(3), on_phase=cancel)
            with pytest.raises(MigrationCancelled):
                await migration.run()
            assert source.state is State.RUNNING
            await letters.wait_for(2)
            assert (await check(source)).ok
        assert os.listdir(tmp_path) == ["guest.img"]
        assert older.read_bytes() == b"an older one"


async def test_a_destination_that_is_cancelled_gives_the_guest_back() -> None:
    async with running("dirtier", hot="8MiB") as (source, letters):
        scope = trio.CancelScope()

        def end(figures: RoundFigures) -> None:
            if figures.round:
                scope.cancel()

        async def send(uri: TransportURI) -> None:
            migration = OutgoingMigration(source, str(uri), policy=Never(), on_round=end)
            with trio.fail_after(60), pytest.raises(MigrationError, match="the destination was stopped"):
                await migration.run()

        async with trio.open_nursery() as nursery:
            incoming = IncomingMigration(
                "tcp:127.0.0.1:0", on_listening=lambda uri: nursery.start_soon(send, uri)
            )
            with scope:
                async with incoming.machine():
                    pytest.fail("it arrived")
        await letters.wait_for(2)
        assert (await check(source)).ok


class Never(Policy):
    """Always wants another round."""

    def decide(self, figures: RoundFigures) -> Decision:
        return Continue()


async def receive_file(path: Path) -> None:
    async with IncomingMigration(f"file:{path}", limits=Limits(setup_timeout=10)).machine():
        pytest.fail("it arrived")


async def test_a_stream_that_is_cut_or_goes_on_or_is_none_leaves_nothing_behind(tmp_path: Path) -> None:
    saved = tmp_path / "guest.img"
    async with running("dirtier", size=8 * MIB, hot="1MiB") as (source, _):
        await OutgoingMigration(source, f"pipe:{saved}").run()
    async with running("dirtier", size=8 * MIB, hot="1MiB") as (source, _):
        await OutgoingMigration(source, f"pipe:{tmp_path / 'older.img'}").run()
    whole, older = saved.read_bytes(), (tmp_path / "older.img").read_bytes()
    cases: list[tuple[bytes, type[KvmmigError], str]] = [
        (b"", StreamTruncated, "ends after 0 bytes"),
        (whole[:8], StreamTruncated, "ends after 8 bytes"),
        (whole[:1000], StreamTruncated, "ends after 1000 bytes, before its hello"),
        (whole[: len(whole) // 2], StreamTruncated, "in its memory; it is not whole"),
        (whole[:-1], StreamTruncated, "not whole"),
        (whole + b"x", StreamError, "goes on behind its end"),
        (b"\x7fELF" + whole[4:], StreamError, "not a kvmmig stream"),
        (whole.replace(b"cpu0/regs", b"cpu0/rags"), StreamError, "its check is wrong"),
        (
            older[: len(older) // 2] + whole[len(older) // 2 :],
            StreamError,
            "of another stream|digest is wrong",
        ),
        (
            whole[: len(older) // 2] + older[len(older) // 2 :],
            StreamError,
            "of another stream|digest is wrong",
        ),
    ]
    with trio.fail_after(60):
        for data, kind, sentence in cases:
            bad = tmp_path / "bad.img"
            bad.write_bytes(data)
            threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
            with pytest.raises(kind, match=sentence) as caught:
                await receive_file(bad)
            assert str(bad) in str(caught.value)
            assert len(os.listdir("/proc/self/fd")) <= fds + 1, "the thread cache may keep one"
            assert not [t for t in threading.enumerate() if "vCPU" in t.name], threads


async def test_a_state_section_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = tmp_path / "guest.img"
    async with running("dirtier", size=8 * MIB, hot="1MiB") as (source, _):
        capture = source.capture

        async def forgetful() -> list[object]:
            return [section for section in await capture() if section.name != "cpu0/sregs"]

        monkeypatch.setattr(source, "capture", forgetful)
        await OutgoingMigration(source, f"file:{saved}").run()
    with pytest.raises(StateMismatch, match=r"guest\.img: .*cpu0/sregs are missing"):
        await receive_file(saved)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (StateSection("dev/floppy", 1, b"x"), "no place for the state section 'dev/floppy'"),
        (StateSection("dev/floppy", 1, bytes(1 << 20)), "claims 10485.. bytes; that is too many"),
        (StateSection("cpu0/regs", 1, b"x"), "'cpu0/regs' is there twice"),
    ],
)
async def test_a_section_that_does_not_belong_is_refused_when_it_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: StateSection, sentence: str
) -> None:
    saved = tmp_path / "guest.img"
    async with running("dirtier", size=8 * MIB, hot="1MiB") as (source, _):
        capture = source.capture

        async def with_another_one() -> list[StateSection]:
            return [*(await capture())[:-1], more]

        monkeypatch.setattr(source, "capture", with_another_one)
        await OutgoingMigration(source, f"pipe:{saved}").run()
    with pytest.raises((StateMismatch, StreamError), match=rf"guest\.img: .*{sentence}"):
        await receive_file(saved)


async def test_with_page_digests_damage_on_a_link_is_refused_and_the_source_runs_on() -> None:
    async with running("dirtier", size=8 * MIB, hot="1MiB") as (source, letters):
        way = "fault+{}?fault.what=corrupt&fault.at=2MiB"
        error = await refused(source, way, Limits(page_digests=True))
        assert "digest is wrong" in str(error)
        await letters.wait_for(2)
        assert (await check(source)).ok
