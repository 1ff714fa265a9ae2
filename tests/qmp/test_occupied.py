"""A stranger can't occupy a monitor: clients, time, descriptors and the log are bounded."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from kvmmig.qmp import QMPServer
from kvmmig.qmp.address import TcpAddress, UnixAddress
from kvmmig.qmp.admission import Admission, Refused
from kvmmig.qmp.connection import NEGOTIATION_LIMIT
from kvmmig.transport.peers import Peer

from .conftest import PATIENCE, Commands, Served, descriptors, error
from .test_descriptors import pass_fds

_OWNER = Peer(0, process=1)
_UNIX = UnixAddress("/a")
_GUARDED = TcpAddress("192.0.2.1", 1, secret_file="/s")
_LOOPBACK = TcpAddress("127.0.0.1", 1)


def remote(host: str) -> Peer:
    return Peer(None, host=host, port=1, local=False)


async def test_one_stranger_gets_a_part_all_of_tcp_gets_more_and_the_owner_finds_room() -> None:
    admission = Admission()
    with ExitStack() as stack:
        for host in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
            for _ in range(16):
                stack.enter_context(admission.admit(remote(host), _GUARDED))
            if host != "2001:db8::1":  # there is no room for anybody's after the third
                with pytest.raises(Refused, match=f"16 clients of {host} are connected already"):
                    stack.enter_context(admission.admit(remote(host), _GUARDED))
        for stranger in (remote("192.0.2.9"), Peer(0, host="127.0.0.1", port=1)):
            with pytest.raises(Refused, match="48 clients are connected by TCP already"):
                stack.enter_context(admission.admit(stranger, _GUARDED))
        for _ in range(16):
            stack.enter_context(admission.admit(_OWNER, _UNIX))
        with pytest.raises(Refused, match="64 clients are connected already"):
            stack.enter_context(admission.admit(_OWNER, _UNIX))
    with admission.admit(remote("192.0.2.1"), _GUARDED), admission.admit(_OWNER, _UNIX):
        pass


@pytest.mark.parametrize(
    "peers",
    [
        [remote(f"2001:db8::{i:x}") for i in range(17)],
        [Peer(4711, host=f"127.0.0.{i}", port=1) for i in range(17)],
        [Peer(None, host=f"127.0.0.{i}", port=1) for i in range(17)],
        [remote(host) for host in ["192.0.2.1"] * 17],
    ],
)
async def test_a_stranger_with_many_addresses_is_still_one(peers: list[Peer]) -> None:
    admission = Admission()
    with ExitStack() as stack:
        for peer in peers[:-1]:
            stack.enter_context(admission.admit(peer, _GUARDED))
        with pytest.raises(Refused, match=r"16 clients of .* are connected already"):
            stack.enter_context(admission.admit(peers[-1], _GUARDED))


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (Peer(4711, process=1), _UNIX),
        (Peer(4711, host="127.0.0.1", port=1), _LOOPBACK),
        (Peer(None, host="127.0.0.1", port=1), _LOOPBACK),
    ],
)
async def test_who_is_not_trusted_is_never_counted(peer: Peer, address: TcpAddress | UnixAddress) -> None:
    admission = Admission()
    for _ in range(100):
        with pytest.raises(Refused, match="for its own user and root"), admission.admit(peer, address):
            pass
    with admission.admit(_OWNER, _UNIX):
        pass


async def test_refusals_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, mock_clock: trio.testing.MockClock
) -> None:
    caplog.set_level(logging.INFO, "kvmmig")
    admission = Admission()

    def refuse() -> None:
        with pytest.raises(Refused), admission.admit(Peer(4711, process=1), _UNIX):
            pass

    for _ in range(1000):
        refuse()
    assert len(caplog.records) == 10
    mock_clock.jump(60)
    refuse()
    assert [record.getMessage() for record in caplog.records[10:]] == [
        "990 more lines about clients were left out",
        "process 1 of user 4711 was refused at the monitor unix:/a: this monitor is for its own user and "
        "root, and you are user 4711",
    ]


async def test_idle_connections_by_tcp_do_not_lock_the_owner_out(
    served: Served, nursery: trio.Nursery
) -> None:
    address = await nursery.start(served.server.serve, "tcp:127.0.0.1:0")
    port = int(address.rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    await served.until(lambda: served.server.clients == 48)
    client = await served.negotiated()
    assert await client.ask({"execute": "hello"}) == {"return": {}}
    for sock in idle:
        sock.close()
    await served.until(lambda: served.server.clients == 1)


@pytest.mark.parametrize("says", [b"", b'{"execute": "hello"}', b'{"execute": '])
async def test_who_does_not_negotiate_is_dropped(
    commands: Commands, mock_clock: trio.testing.MockClock, nursery: trio.Nursery, says: bytes
) -> None:
    server = QMPServer(commands.table, version="1")
    address = await nursery.start(server.serve, "tcp:127.0.0.1:0")
    patient, silent = [
        await trio.open_tcp_stream("127.0.0.1", int(address.rpartition(":")[2])) for _ in range(2)
    ]
    await patient.send_all(b'{"execute": "qmp_capabilities"}')
    await silent.send_all(says)
    for client, wanted in ((patient, 2), (silent, 2 if says.endswith(b"}") else 1)):
        told = b""
        while told.count(b"\n") < wanted:
            told += await client.receive_some()
    mock_clock.jump(NEGOTIATION_LIMIT)
    told = b"".join([chunk async for chunk in silent])
    assert b"there was no 'qmp_capabilities' for 30 s" in told
    mock_clock.jump(10 * NEGOTIATION_LIMIT)
    await patient.send_all(b'{"execute": "hello"}')
    assert await patient.receive_some() == b'{"return": {}}\r\n'
    for client in (patient, silent):
        await client.aclose()


async def test_all_clients_together_hold_only_so_many_descriptors(served: Served) -> None:
    before = descriptors()
    clients = [await served.negotiated() for _ in range(30)]
    connected = descriptors()
    for client in clients:
        await pass_fds(client.stream, b'{"execute": "hello"}', [0] * 16)
        assert await client.next() == {"return": {}}
    assert len(descriptors() - connected) == 256
    late = await served.negotiated()
    await pass_fds(late.stream, b'{"execute": "getfd", "arguments": {"fdname": "a"}}', [0])
    assert await late.next() == error("No file descriptor supplied via SCM_RIGHTS")
    with trio.fail_after(PATIENCE):
        for client in (late, *clients):
            await client.stream.aclose()
        await served.until(lambda: served.server.clients == 0)
    assert len(descriptors() - before) == 0
