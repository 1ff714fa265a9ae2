"""Real guests through the other transports, and through the wrappers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

from kvmmig import guests
from kvmmig.errors import ChannelBroken, KvmmigError, OutcomeUnknown
from kvmmig.machine import Entry, Machine, MachineConfig, Program, State
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import Runs
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.transport import TransportURI
from tests.transports import certificates

pytestmark = pytest.mark.kvm

SIZE = 16 << 20


@asynccontextmanager
async def dirtier() -> AsyncIterator[Machine]:
    """A guest that writes all the while."""
    program = guests.find("dirtier").program(memory=SIZE, cpus=1, settings={"hot": "1MiB"})
    config = MachineConfig(memory=SIZE, name=program.name, parameters=program.parameters)
    async with Machine.open(config) as machine:
        await machine.load(program)
        await machine.start()
        yield machine


async def require_sound(machine: Machine) -> None:
    await machine.pause()
    result = await trio.to_thread.run_sync(guests.check_machine, machine)
    assert result is not None
    assert result.ok, result.summary


async def receive(where: str, on_listening: Callable[[TransportURI], None] | None = None) -> None:
    async with IncomingMigration(where, on_listening=on_listening).machine() as machine:
        assert machine.state is State.RUNNING
        await require_sound(machine)


async def move(sending: str, receiving: str) -> None:
    """At the same time on both sides."""
    with trio.fail_after(60):
        async with dirtier() as source:
            async with trio.open_nursery() as nursery:

                def send(uri: TransportURI) -> None:
                    where = sending.format(uri=uri)
                    nursery.start_soon(OutgoingMigration(source, where, policy=MaxRounds(3)).run)

                await receive(receiving, send)
            assert source.state is State.MOVED


async def save(sending: str) -> None:
    with trio.fail_after(60):
        async with dirtier() as source:
            await OutgoingMigration(source, sending, policy=MaxRounds(3)).run()
            assert source.state is State.MOVED


async def restore(receiving: str) -> None:
    with trio.fail_after(60):
        await receive(receiving)


async def fail_to_save(sending: str) -> KvmmigError:
    """The guest runs on here, and is sound."""
    with trio.fail_after(60):
        async with dirtier() as source:
            with pytest.raises(KvmmigError) as caught:
                await OutgoingMigration(source, sending, policy=MaxRounds(3)).run()
            assert source.state is State.RUNNING
            await require_sound(source)
            return caught.value


async def test_unix(tmp_path: Path) -> None:
    await move("{uri}", f"unix:{tmp_path}/a.sock")


async def test_exec_there_and_back(tmp_path: Path) -> None:
    await save(f"exec:gzip -1 > {tmp_path}/guest.gz")
    await restore(f"exec:gzip -dc {tmp_path}/guest.gz")


@pytest.mark.parametrize("takes", ["head -c 1000000 >/dev/null", "cat >/dev/null"])
async def test_a_command_that_stores_the_guest_and_fails_gives_it_back(takes: str) -> None:
    error = await fail_to_save(f"exec:{takes}; echo no room for more >&2; exit 1?live=off")
    assert isinstance(error, ChannelBroken)
    assert "ended with status 1; it said: no room for more" in str(error)


async def test_a_command_that_fails_before_it_has_all_of_the_guest_gives_it_back() -> None:
    error = await fail_to_save("exec:head -c 1000000 >/dev/null; echo no room for more >&2; exit 1")
    assert isinstance(error, ChannelBroken)
    assert "ended with status 1; it said: no room for more" in str(error)


async def test_a_command_that_has_all_of_the_guest_and_fails_is_the_operators_affair() -> None:
    """It might have been an ssh that lost its connection to a guest that runs."""
    with trio.fail_after(60):
        async with dirtier() as source:
            with pytest.raises(OutcomeUnknown, match="ended with status 255"):
                await OutgoingMigration(source, "exec:cat >/dev/null; exit 255", policy=MaxRounds(3)).run()
            assert source.state is State.MOVED
            await source.resume(force=True)
            await require_sound(source)


async def test_fds_of_a_socket_pair() -> None:
    ours, theirs = (end.detach() for end in socket.socketpair())
    await move(f"fd:{ours}", f"fd:{theirs}")


async def test_fds_of_a_pipe() -> None:
    reading, writing = os.pipe()
    await move(f"fd:{writing}", f"fd:{reading}")


async def test_the_other_sides_event_loop_copies_few_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, most = threading.get_ident(), {True: 0, False: 0}  # pages at a time, on the loop and elsewhere
    scatter = GuestMemory.scatter

    def noted(memory: GuestMemory, runs: Runs, data: npt.NDArray[np.uint64]) -> None:
        here = threading.get_ident() == loop
        most[here] = max(most[here], len(data))
        scatter(memory, runs, data)

    monkeypatch.setattr(GuestMemory, "scatter", noted)
    async with Machine.open(MachineConfig(memory=SIZE)) as source:
        await source.load(Program("spinner", Entry.LONG64, b"\xeb\xfe"))
        for page in range(SIZE // 8192, SIZE // 4096, 2):
            source.memory.write(page * 4096, b"x")
        await source.start()
        async with trio.open_nursery() as nursery:

            def send(uri: TransportURI) -> None:
                nursery.start_soon(OutgoingMigration(source, str(uri), policy=MaxRounds(1)).run)

            incoming = IncomingMigration("tcp:127.0.0.1:0", on_listening=send)
            async with incoming.machine() as machine:
                assert bytes(machine.memory.pages(SIZE // 4096 - 2, 1)[:1]) == b"x"
    assert most[False] == 1024
    assert most[True] < 128


async def test_throttled_tcp() -> None:
    options = "throttle.rate=200MB/s&throttle.latency=2ms&throttle.jitter=2ms"
    await move("throttle+{uri}?" + options, "tcp:127.0.0.1:0")


async def test_several_connections() -> None:
    await move("{uri}", "tcp:127.0.0.1:0?lanes=2")


@pytest.mark.parametrize("what", ["short", "stall"])
async def test_a_fault_that_ends_by_itself_loses_nothing(what: str) -> None:
    await move("fault+{uri}?fault.for=100ms&fault.at=1MiB&fault.what=" + what, "tcp:127.0.0.1:0")


@pytest.mark.parametrize("where", ["at=1MiB", "seed=7&fault.at=10MiB", "at=3", "phase=final"])
async def test_a_cut_link_gives_the_guest_back_and_leaves_no_file(where: str, tmp_path: Path) -> None:
    error = await fail_to_save(f"fault+file:{tmp_path}/guest.img?fault.{where}")
    assert "fault+ cut the connection" in str(error)
    assert not os.listdir(tmp_path)


async def test_a_corrupted_byte_is_found(tmp_path: Path) -> None:
    await save(f"fault+file:{tmp_path}/guest.img?fault.what=corrupt&fault.at=2MiB")
    with pytest.raises(KvmmigError):
        await restore(f"file:{tmp_path}/guest.img")


async def test_the_command_takes_a_guest_from_its_standard_input(tmp_path: Path) -> None:
    await save(f"exec:cat > {tmp_path}/guest.img")
    command = [sys.executable, "-m", "kvmmig", "run", "--incoming", "fd:0"]
    said = ""
    with trio.fail_after(60):
        reading, writing = os.pipe()
        cat = await trio.lowlevel.open_process(["cat", f"{tmp_path}/guest.img"], stdout=writing)
        arriving = await trio.lowlevel.open_process(
            command, stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        os.close(reading)
        os.close(writing)
        assert arriving.stderr is not None
        async for chunk in arriving.stderr:
            said += chunk.decode()
            if "has arrived" in said:
                arriving.terminate()
        await arriving.wait()
        await cat.wait()
    assert "the guest 'dirtier' has arrived" in said


async def test_a_standard_input_that_is_neither_socket_nor_pipe_is_a_sentence() -> None:
    command = [sys.executable, "-m", "kvmmig", "run", "--incoming", "fd:0"]
    with trio.fail_after(60):
        done = await trio.run_process(
            command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
        )
    assert "fd:0 is a character device; give a socket or a pipe" in done.stderr.decode()


@pytest.mark.parametrize("how", ["--incoming", "live=on", ""])
async def test_a_command_that_goes_on_with_the_guest_is_left_with_it(how: str, tmp_path: Path) -> None:
    """Also when nothing says that it would: then only the operator knows."""
    printed, pid, script = (tmp_path / name for name in ("printed", "pid", "take-it"))
    command = f"exec {sys.executable} -m kvmmig run --incoming fd:0 --serial {printed}"
    script.write_text(f"echo $$ > {pid}; {command}")
    uri = f"exec:echo $$ > {pid}; {command}" if how == "--incoming" else f"exec:exec sh {script}"
    with trio.fail_after(60):
        async with dirtier() as source:
            if how:
                figures = await OutgoingMigration(
                    source, uri + ("?live=on" if how == "live=on" else "")
                ).run()
                assert figures.downtime is not None
            else:
                with pytest.raises(
                    OutcomeUnknown, match=r"does not end; .* write live=on behind the command"
                ):
                    await OutgoingMigration(source, uri, limits=Limits(handover_timeout=5)).run()
            assert source.state is State.MOVED
        with trio.fail_after(60):
            while not printed.exists() or len(printed.read_bytes()) < 3:  # noqa: ASYNC110  # its own pace
                await trio.sleep(0.05)
    assert b"FAIL" not in printed.read_bytes()
    os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.mark.parametrize("wrappers", ["tls", "secret", "secret+tls"])
async def test_over_a_connection_that_lets_nobody_else_in(wrappers: str, tmp_path: Path) -> None:
    certificates.make(tmp_path)
    (tmp_path / "secret").touch(0o600)
    (tmp_path / "secret").write_text("what both sides know")
    given = {"tls": f"tls.dir={tmp_path}", "secret": f"secret.key.file={tmp_path}/secret"}
    options = "&".join(given[wrapper] for wrapper in wrappers.split("+"))
    await move(f"{wrappers}+{{uri}}?{options}", f"{wrappers}+tcp:127.0.0.1:0?{options}")
