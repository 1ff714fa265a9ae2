"""A monitor on a socket that was handed over, or that it has connected; one that waits for its client."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.qmp import QMPClient, QMPServer

from .conftest import PATIENCE, Commands, RawClient

_POLITE = b'{"execute": "qmp_capabilities"}'


async def polite(client: RawClient) -> None:
    await client.negotiate()
    assert await client.ask({"execute": "hello"}) == {"return": {}}


def wrapped(sock: socket.socket) -> RawClient:
    sock.setblocking(False)
    return RawClient(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))


async def test_a_connected_socket_that_was_handed_over_is_served_until_its_client_goes(
    commands: Commands, nursery: trio.Nursery
) -> None:
    ours, theirs = socket.socketpair()
    server = QMPServer(commands.table, version="1")
    number = theirs.detach()
    with trio.fail_after(PATIENCE):
        assert await nursery.start(server.serve, f"fd:{number}") == f"fd:{number}"
        client = wrapped(ours)
        await polite(client)
        await client.stream.aclose()
        while server.clients:  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.005)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


async def test_a_listening_socket_that_was_handed_over_serves_many(
    commands: Commands, nursery: trio.Nursery, tmp_path: Path
) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tmp_path}/a")
    listener.listen()
    server = QMPServer(commands.table, version="1")
    with trio.fail_after(PATIENCE):
        await nursery.start(server.serve, f"socket,id=m,fd={listener.detach()},server=on,wait=off")
        for _ in range(2):
            async with QMPClient.connect(f"unix:{tmp_path}/a") as client:
                await client.execute("hello")
    nursery.cancel_scope.cancel()


def unix(directory: Path) -> tuple[socket.socket, str]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/a")
    listener.listen()
    return listener, f"unix:{directory}/a,server=off"


def tcp(directory: Path) -> tuple[socket.socket, str]:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"tcp:127.0.0.1:{listener.getsockname()[1]},server=off"


def chardev(directory: Path) -> tuple[socket.socket, str]:
    return unix(directory)[0], f"socket,id=m,path={directory}/a"


@pytest.mark.parametrize("listen", [unix, tcp, chardev], ids=lambda listen: listen.__name__)
async def test_it_connects_to_who_waits_for_it(
    commands: Commands,
    nursery: trio.Nursery,
    tmp_path: Path,
    listen: Callable[[Path], tuple[socket.socket, str]],
) -> None:
    listener, address = listen(tmp_path)
    with trio.fail_after(PATIENCE), listener:
        nursery.start_soon(QMPServer(commands.table, version="1").serve, address)
        client = wrapped((await trio.to_thread.run_sync(listener.accept))[0])
        await polite(client)
        await client.stream.aclose()


async def test_one_that_waits_has_started_when_its_client_is_there(
    commands: Commands, nursery: trio.Nursery, tmp_path: Path
) -> None:
    notices: list[str] = []
    server = QMPServer(commands.table, version="1", notices=notices.append)
    started = trio.Event()

    async def start() -> None:
        await nursery.start(server.serve, f"unix:{tmp_path}/a,server=on")
        started.set()

    with trio.fail_after(PATIENCE):
        nursery.start_soon(start)
        while not notices:  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.005)
        assert not started.is_set()
        async with QMPClient.connect(f"unix:{tmp_path}/a"):
            await started.wait()
        async with QMPClient.connect(f"unix:{tmp_path}/a"):
            pass
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("fd:999", "descriptor 999 is not open"),
        ("unix:/nonexistent/a,server=off", "there is no such socket"),
    ],
)
async def test_what_is_not_there_is_one_sentence(commands: Commands, address: str, sentence: str) -> None:
    with pytest.raises(ConnectFailed, match=sentence):
        await QMPServer(commands.table, version="1").serve(address)


async def test_what_is_no_stream_socket_is_one_sentence(commands: Commands) -> None:
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        for fd in (writer, os.dup(datagrams.fileno())):
            with pytest.raises(ConnectFailed, match="is no monitor's"):
                await QMPServer(commands.table, version="1").serve(f"fd:{fd}")
    os.close(reader)


async def test_who_can_not_be_known_gets_no_monitor_at_a_handed_over_socket_either(
    commands: Commands, autojump_clock: trio.testing.MockClock
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        served = listener.accept()[0]
    client.close()  # whoever it was, the kernel does not know any more
    with pytest.raises(ConnectFailed, match="it is for this user and root, and there is tcp:127"):
        await QMPServer(commands.table, version="1").serve(f"fd:{served.detach()}")
    with pytest.raises(BadURI):
        await QMPServer(commands.table, version="1").serve("fd:x")
