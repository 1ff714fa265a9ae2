"""Who connects to a destination: no stranger ends it, holds it up, or takes its memory."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kvmmig import stream
from kvmmig.errors import ConnectFailed, KvmmigError, MigrationRefused
from kvmmig.machine import Entry, Machine, MachineConfig, Program, State
from kvmmig.machine.memory import GuestMemory
from kvmmig.migration import clients, incoming
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.migration.welcome import Welcome
from kvmmig.transport import TransportURI
from tests.strangers import as_nobody, needs_second_user

pytestmark = pytest.mark.kvm

SPINNER = Program("spinner", Entry.LONG64, b"\xeb\xfe")
CONFIG = MachineConfig(memory=2 << 20, name="spinner")
PATIENCE = 60.0
TIME = Limits(setup_timeout=PATIENCE, stall_timeout=PATIENCE, handover_timeout=PATIENCE)


class Destination:
    """It listens until a guest is here."""

    def __init__(self) -> None:
        self.uri = TransportURI("none", "")
        self.incoming: IncomingMigration
        self.machine: Machine | None = None
        self.setbacks: list[KvmmigError] = []

    async def run(
        self,
        at: str,
        welcome: Welcome | None = None,
        limits: Limits = TIME,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        def note(uri: TransportURI) -> None:
            self.uri = uri
            task_status.started()

        self.incoming = IncomingMigration(
            at,
            welcome=welcome,
            limits=limits,
            on_listening=note,
            on_setback=self.setbacks.append,
            on_here=lambda machine: setattr(self, "machine", machine),
        )
        async with self.incoming.machine():
            await trio.sleep_forever()


@asynccontextmanager
async def destination(
    at: str = "tcp:127.0.0.1:0", welcome: Welcome | None = None, limits: Limits = TIME
) -> AsyncIterator[Destination]:
    there = Destination()
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            await nursery.start(there.run, at, welcome, limits)
            yield there
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def guest() -> AsyncIterator[Machine]:
    async with Machine.open(CONFIG) as machine:
        await machine.load(SPINNER)
        await machine.start()
        yield machine


async def move(machine: Machine, uri: TransportURI | str) -> None:
    await OutgoingMigration(machine, uri, policy=MaxRounds(1)).run()


async def comes_all_the_same(there: Destination) -> None:
    async with guest() as machine:
        await move(machine, there.uri)
        assert there.machine is not None
        assert there.machine.state is State.RUNNING


def hello_of(machine: Machine) -> bytes:
    encoder = stream.Encoder(stream.Direction.FORWARDS)
    parts = [encoder.preamble(), *_flat(encoder.hello(machine.memory.n_pages, machine.description.encode()))]
    return b"".join(parts)


def _flat(data: object) -> list[bytes]:
    return [data] if isinstance(data, bytes) else [bytes(part) for part in data]  # type: ignore[attr-defined]  # a sequence


async def connect(there: Destination) -> trio.SocketStream:
    if there.uri.scheme == "unix":
        return await trio.open_unix_socket(there.uri.target)
    host, _, port = there.uri.target.rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


async def scan(client: trio.SocketStream, hello: bytes) -> None:
    await client.aclose()


async def get(client: trio.SocketStream, hello: bytes) -> None:
    await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


async def be_silent(client: trio.SocketStream, hello: bytes) -> None:
    await trio.lowlevel.checkpoint()


async def say_half_a_hello(client: trio.SocketStream, hello: bytes) -> None:
    await client.send_all(hello[: len(hello) // 2])


async def say_hello_and_no_more(client: trio.SocketStream, hello: bytes) -> None:
    await client.send_all(hello)


async def say_hello_and_go(client: trio.SocketStream, hello: bytes) -> None:
    await client.send_all(hello)
    await client.aclose()


Stranger = Callable[[trio.SocketStream, bytes], Awaitable[None]]
STRANGERS: list[Stranger] = [scan, get, be_silent, say_half_a_hello, say_hello_and_no_more, say_hello_and_go]


@pytest.mark.parametrize("act", STRANGERS)
async def test_a_stranger_ends_no_destination_and_takes_no_memory(
    act: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guest() as other:
        hello, made = hello_of(other), []
        async with destination() as there:
            with monkeypatch.context() as patch:
                patch.setattr(GuestMemory, "__init__", lambda *_: made.append(1))
                strangers = [await connect(there) for _ in range(3)]
                for client in strangers:
                    await act(client, hello)
                if act is say_hello_and_no_more:
                    for client in strangers:  # the answer: it is welcome, and has got no memory for that
                        assert await client.receive_some(1)
            assert not made
            await comes_all_the_same(there)
            for client in strangers:
                await trio.aclose_forcefully(client)


async def test_so_many_silent_clients_keep_no_source_away(caplog: pytest.LogCaptureFixture) -> None:
    async with destination() as there:
        crowd = [await connect(there) for _ in range(clients.MOST_CLIENTS + 8)]
        await comes_all_the_same(there)
        for client in crowd:
            await trio.aclose_forcefully(client)
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("made room" in record.getMessage() for record in lines)
    assert len(lines) <= 11, "a stranger must not fill a log"


async def test_a_silent_client_of_a_handshake_holds_up_nobody(tmp_path: Path) -> None:
    secret, other = tmp_path / "secret", tmp_path / "other"
    for file in (secret, other):
        file.touch(0o600)
        file.write_text(file.name * 10)
    at = f"secret+tcp:127.0.0.1:0?secret.key.file={secret}"
    async with destination(at) as there, guest() as machine:
        crowd = [await connect(there) for _ in range(20)]
        with pytest.raises(ConnectFailed, match="does not know the secret"):
            await move(machine, f"secret+{there.uri}?secret.key.file={other}")
        began = trio.current_time()
        await move(machine, f"secret+{there.uri}?secret.key.file={secret}")
        assert trio.current_time() - began < 9, "no silent client's time is waited for"
        for client in crowd:
            await trio.aclose_forcefully(client)


async def test_a_client_that_is_silent_for_long_is_told_so() -> None:
    async with destination(limits=Limits(setup_timeout=0.05)) as there:
        said = b""
        async with await connect(there) as client:
            with contextlib.suppress(trio.BrokenResourceError):
                while part := await client.receive_some():
                    said += part
        assert b"sent no hello within 0.05 s" in said


async def test_a_source_that_dies_with_half_of_its_guest_makes_room_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with destination() as there, guest() as machine:
        with pytest.raises(KvmmigError):
            await move(machine, f"fault+{there.uri}?fault.what=cut&fault.at=20kB")
        assert machine.state is State.RUNNING
        while not there.setbacks:  # noqa: ASYNC110 - it is told by a callback
            await trio.sleep(0.001)
        assert there.machine is None
        await comes_all_the_same(there)


async def test_a_source_that_falls_silent_is_given_up_sooner_where_another_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(incoming, "_SILENCE_IN_THE_WAY", 0.1)
    async with destination() as there, guest() as machine, trio.open_nursery() as nursery:

        async def stall() -> None:
            with pytest.raises(MigrationRefused, match=r"has sent nothing for 0\.1 s"):
                await move(machine, f"fault+{there.uri}?fault.what=stall&fault.at=20kB")

        nursery.start_soon(stall)
        while not there.incoming.received_bytes:  # noqa: ASYNC110 - nothing tells it
            await trio.sleep(0.001)
        await comes_all_the_same(there)
        assert len(there.setbacks) == 1


async def test_a_guest_that_is_too_large_is_refused_before_it_has_memory() -> None:
    bounds = Welcome(max_memory=1 << 20)
    async with destination(welcome=bounds) as there, guest() as machine:
        with pytest.raises(MigrationRefused, match=r"has 2MiB of memory, .* takes 1MiB at most"):
            await move(machine, there.uri)
        assert machine.state is State.RUNNING
        assert not there.incoming.peer


@pytest.mark.parametrize("origin", ["192.0.2.0/24", "user:65534"])
async def test_who_does_not_come_from_where_guests_may_come_from_is_refused(origin: str) -> None:
    bounds = Welcome.of(max_memory=None, max_cpus=None, accept_from=[origin])
    async with destination(welcome=bounds) as there, guest() as machine:
        with pytest.raises(MigrationRefused, match=f"takes guests from {origin}, and you are tcp:127"):
            await move(machine, there.uri)


@pytest.mark.parametrize("origin", ["127.0.0.1", "127.0.0.0/8", f"user:{os.geteuid()}", "any"])
async def test_who_comes_from_where_guests_may_come_from_is_welcome(origin: str) -> None:
    bounds = Welcome.of(max_memory=None, max_cpus=None, accept_from=["2001:db8::/32", origin])
    async with destination(welcome=bounds) as there:
        await comes_all_the_same(there)
        assert there.incoming.peer.endswith(f"(user {os.geteuid()})")


@needs_second_user
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_another_user_of_this_host_gets_in_only_where_that_was_said(kind: str) -> None:
    at = "tcp:127.0.0.1:0" if kind == "tcp" else f"unix:/tmp/kvmmig-test-{os.getpid()}.sock"
    for welcome, answer in (
        (None, b"takes guests from its own user and root, and you are"),
        (Welcome.of(max_memory=None, max_cpus=None, accept_from=["user:65534"]), b"not a kvmmig stream"),
    ):
        async with destination(at, welcome) as there:
            if kind == "unix" and welcome is None:
                assert os.stat(there.uri.target).st_mode & 0o777 == 0o600
                os.chmod(there.uri.target, 0o777)
            heard = await trio.to_thread.run_sync(_heard_by_nobody, there.uri)
            assert answer in heard


def _heard_by_nobody(uri: TransportURI) -> bytes:
    """What that user is told who talks nonsense."""
    import socket

    heard, said = os.pipe()

    def act() -> object:
        family = socket.AF_UNIX if uri.scheme == "unix" else socket.AF_INET
        host, _, port = uri.target.rpartition(":")
        with socket.socket(family) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(uri.target if uri.scheme == "unix" else (host, int(port)))
            sock.sendall(bytes(1000))
            with contextlib.suppress(ConnectionResetError):
                while part := sock.recv(4096):
                    os.write(said, part)
        return None

    with as_nobody(act):
        os.close(said)
    with open(heard, "rb") as file:
        return file.read()


@needs_second_user
async def test_no_guest_goes_to_another_user_of_this_host_unless_the_uri_says_so() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with as_nobody(lambda: socket.create_server(("127.0.0.1", port))):
        async with guest() as machine:
            for uri, sentence in (
                (f"tcp:127.0.0.1:{port}", "user 65534.* listens there, and is neither this user nor root"),
                (f"tcp:127.0.0.1:{port}?user={os.geteuid()}", "is user 65534, and not user"),
            ):
                with pytest.raises(ConnectFailed, match=sentence):
                    await move(machine, uri)
            migration = OutgoingMigration(
                machine, f"tcp:127.0.0.1:{port}?user=nobody", limits=Limits(setup_timeout=0.05)
            )
            with pytest.raises(KvmmigError, match='did not say "accept"'):
                await migration.run()
            assert machine.state is State.RUNNING
