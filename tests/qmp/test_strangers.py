"""Nobody gets in: another user, another protocol, one who does not know the secret."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.qmp import QMPClient, QMPServer
from kvmmig.qmp.secret import Proofs, read_secret
from kvmmig.transport.peers import Peer, is_loopback, peer_of
from tests.strangers import NOBODY, needs_second_user

from .conftest import PATIENCE, Commands, RawClient, Served, error

_SECRET = "a secret that nobody guesses\n"
# Becomes that user, who need not be able to read Python's own files; connects, is greeted, sends its
# standard input, and prints what comes until the end.
_STRANGER = """
import encodings.idna, os, socket, sys
user, kind, *where = sys.argv[1:]
os.setgroups([])
os.setresgid(int(user), int(user), int(user))
os.setresuid(int(user), int(user), int(user))
if kind == "unix":
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(where[0])
else:
    sock = socket.create_connection((where[0], int(where[1])))
try:
    sys.stdout.buffer.write(sock.recv(4096))
    sock.sendall(sys.stdin.buffer.read())
    while data := sock.recv(4096):
        sys.stdout.buffer.write(data)
except ConnectionError:
    pass
"""
_POLITE = b'{"execute": "qmp_capabilities"}{"execute": "hello"}'


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user can look into."""
    path = tempfile.mkdtemp()
    os.chmod(path, 0o755)
    yield Path(path)
    shutil.rmtree(path)


async def as_user(user: int, address: str) -> list[dict[str, object]]:
    """What that user is told, who negotiates and gives a command."""
    kind, _, where = address.partition(":")
    arguments = [where] if kind == "unix" else [text.strip("[]") for text in where.rsplit(":", 1)]
    done = await trio.run_process(
        [sys.executable, "-I", "-c", _STRANGER, str(user), kind, *arguments],
        stdin=_POLITE,
        capture_stdout=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_second_user
@pytest.mark.parametrize("kind", ["unix", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
async def test_another_user_of_this_host_is_told_that_it_is_not_for_him(
    commands: Commands,
    nursery: trio.Nursery,
    open_directory: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    server = QMPServer(commands.table, version="1")
    wanted = f"unix:{open_directory}/a.sock" if kind == "unix" else kind
    with trio.fail_after(PATIENCE):
        address = await nursery.start(server.serve, wanted)
        if kind == "unix":
            os.chmod(open_directory / "a.sock", 0o666)
        told = await as_user(NOBODY, address)
        assert told == [error("this monitor is for its own user and root, and you are user 65534")]
    assert not commands.sessions
    assert f"of user {NOBODY} was refused at the monitor {address}" in caplog.text


@needs_second_user
async def test_insecure_means_everybody_and_the_log_says_who(
    commands: Commands, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = QMPServer(commands.table, version="1")
    with trio.fail_after(PATIENCE):
        address = await nursery.start(server.serve, "tcp:127.0.0.1:0,insecure=on")
        async with QMPClient.connect(address):
            pass
        nursery.start_soon(as_user, NOBODY, address.removesuffix(",insecure=on"))
        while not commands.sessions:  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.005)
        assert commands.sessions[0].peer.endswith(f"of user {NOBODY}")
        assert f"{commands.sessions[0].peer} is connected to the monitor" in caplog.text
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["unix", "tcp:127.0.0.1:0", "tcp:[::1]:0"])
async def test_a_session_is_named_after_who_it_is(
    commands: Commands, nursery: trio.Nursery, tmp_path: Path, kind: str
) -> None:
    server = QMPServer(commands.table, version="1")
    with trio.fail_after(PATIENCE):
        address = await nursery.start(server.serve, f"unix:{tmp_path}/a" if kind == "unix" else kind)
        async with QMPClient.connect(address) as client:
            await client.execute("hello")
    assert commands.sessions[0].peer.endswith(f"of user {os.geteuid()}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.1.2.3"])
def test_a_peer_that_has_gone_is_nobody_and_not_root(host: str) -> None:
    """The kernel says user 0 of a socket that no process has any more."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        with listener.accept()[0] as served:
            assert peer_of(served).user == os.geteuid()
            client.close()
            assert peer_of(served).user is None
            assert not peer_of(served).trusted


def test_a_peer_by_ipv4_on_an_ipv6_socket_is_known_too() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        with socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
            with listener.accept()[0] as served:
                assert peer_of(served).user == os.geteuid()


def test_trusted_are_this_user_and_root_on_this_host() -> None:
    assert Peer(os.geteuid(), process=1).trusted
    assert Peer(0, host="127.0.0.1", port=1).trusted
    assert not Peer(os.geteuid() + 1, process=1).trusted
    assert not Peer(None, host="192.0.2.1", port=1, local=False).trusted
    loopback = ("127.9.9.9", "::1", "::ffff:127.0.0.1")
    assert [is_loopback(host) for host in (*loopback, "0.0.0.0", "::", "192.0.2.1", "fe80::1%lo")] == [
        *[True] * 3,
        *[False] * 4,
    ]


# -- another protocol -------------------------------------------------------------------------------------

_BODY = b'{"execute": "qmp_capabilities"}\n{"execute": "hello"}\n'


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + _BODY,
        b"POST / HTTP/1.1\r\nContent-Type: text/plain\r\n\r\n" + _BODY,
        b"\r\n\r\nPUT / HTTP/1.1\r\n\r\n" + _BODY,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _BODY,
        b"SSH-2.0-x\r\n" + _BODY,
        b"\x16\x03\x01\x02\x00\x01\n" + _BODY,
        b"\xff" + _BODY,
        b"\0\n" + _BODY,
        b"7\n" + _BODY,
        b'"a"\n' + _BODY,
        b"[]" + _BODY,
        b"[" + _BODY.replace(b"\n", b",") + b"{}]" + _BODY,
        b'{"execute": "x"\n\n]' + _BODY,
        b'{"execute": "x"}\nGET / HTTP/1.1\r\n\r\n' + _BODY,
        b"{" * 300 + b"\n" + _BODY,
        b'{"a": "' + b"x" * 70_000 + b'"}\n' + _BODY,
    ],
)
@pytest.mark.parametrize("step", [1 << 20, 100])
async def test_before_negotiation_what_is_no_json_object_ends_the_connection(
    served: Served, commands: Commands, data: bytes, step: int
) -> None:
    client = await served.raw()
    assert "QMP" in await client.next()
    try:
        for start in range(0, len(data), step):
            await client.send(data[start : start + step])
    except trio.BrokenResourceError:
        pass
    await served.until(lambda: served.server.clients == 0)
    while line := await client.line():
        assert b'"error"' in line
    assert not commands.sessions


# -- a secret ---------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret, of mine"
    path.write_text(_SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
async def guarded(commands: Commands, nursery: trio.Nursery, secret: Path) -> str:
    """A monitor's address that asks for the secret."""
    server = QMPServer(commands.table, version="1")
    return str(
        await nursery.start(server.serve, f"tcp:127.0.0.1:0,secret-file={str(secret).replace(',', ',,')}")
    )


def without_secret(address: str) -> str:
    return address.partition(",")[0]


async def raw(address: str) -> RawClient:
    host, port = without_secret(address).removeprefix("tcp:").split(":")
    return RawClient(await trio.open_tcp_stream(host, int(port)))


async def test_who_knows_the_secret_gets_in(guarded: str, commands: Commands) -> None:
    with trio.fail_after(PATIENCE):
        async with QMPClient.connect(guarded) as client:
            assert await client.execute("hello") == {}
    assert len(commands.sessions) == 1


async def test_who_does_not_know_it_does_not(guarded: str, commands: Commands, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another secret, of the right length")
    wrong.chmod(0o600)
    with trio.fail_after(PATIENCE):
        with pytest.raises(ConnectFailed, match="asks for a secret; add ,secret-file=PATH"):
            async with QMPClient.connect(without_secret(guarded)):
                pass
        with pytest.raises(ConnectFailed, match="does not prove that you know"):
            async with QMPClient.connect(f"{without_secret(guarded)},secret-file={wrong}"):
                pass
    assert not commands.sessions


@pytest.mark.parametrize(
    "attempt",
    [
        "{}",
        '{"execute": "qmp_capabilities"}',
        '{"execute": "hello"}',
        '{"execute": "x-kvmmig-prove"}',
        '{"execute": "x-kvmmig-prove", "arguments": {"nonce": 1, "proof": 2}}',
        '{"execute": "x-kvmmig-prove", "arguments": {"nonce": "", "proof": ""}}',
        '{"execute": "x-kvmmig-prove", "arguments": {"nonce": "%s", "proof": "\u00e9"}}' % ("0" * 64),
        "GET / HTTP/1.1\r\n",
    ],
)
async def test_one_has_one_try(
    guarded: str, commands: Commands, attempt: str, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(PATIENCE):
        client = await raw(guarded)
        assert "x-kvmmig-challenge" in await client.next()
        await client.send(attempt)
        assert "error" in await client.next()
        assert await client.line() == b""
        await client.stream.aclose()
    assert not commands.sessions
    assert "does not know the monitor's secret" in caplog.text


async def test_a_proof_is_for_one_connection_and_one_side(guarded: str, secret: Path) -> None:
    ours = "0" * 64
    with trio.fail_after(PATIENCE):
        first, second = await raw(guarded), await raw(guarded)
        nonces = [(await client.next())["x-kvmmig-challenge"]["nonce"] for client in (first, second)]
        assert nonces[0] != nonces[1]
        of_first = Proofs(read_secret(str(secret)), nonces[0], ours)
        proof = {"execute": "x-kvmmig-prove", "arguments": {"nonce": ours, "proof": of_first.make("client")}}
        assert (await first.ask(proof)) == {"return": {"proof": of_first.make("server")}}
        assert "error" in await second.ask(proof)
        third = await raw(guarded)
        nonce = (await third.next())["x-kvmmig-challenge"]["nonce"]
        server_proof = Proofs(read_secret(str(secret)), nonce, ours).make("server")
        proof["arguments"] = {"nonce": ours, "proof": server_proof}
        assert "error" in await third.ask(proof)
        for client in (first, second, third):
            await client.stream.aclose()


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (b'{"QMP": {"version": {}, "capabilities": []}}\r\n', "does not ask for a secret"),
        (
            b'{"x-kvmmig-challenge": {"nonce": "%s"}}\r\n{"return": {"proof": "00"}, "id": 1}\r\n'
            % (b"0" * 64),
            "does not know the secret; it is not yours",
        ),
        (b'{"x-kvmmig-challenge": {"nonce": ""}}\r\n{"return": {}, "id": 1}\r\n', "not yours"),
        (b'{"x-kvmmig-challenge": {"nonce": 1}}\r\n', "does not speak QMP"),
    ],
)
async def test_a_monitor_that_does_not_know_it_is_not_ours(secret: Path, says: bytes, sentence: str) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def stranger(stream: trio.SocketStream) -> None:
        for line in says.splitlines(keepends=True):
            await stream.send_all(line)
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, stranger, listeners)
        port = listeners[0].socket.getsockname()[1]
        address = f"tcp:127.0.0.1:{port},secret-file={str(secret).replace(',', ',,')}"
        with pytest.raises(ConnectFailed, match=sentence):
            async with QMPClient.connect(address):
                pass
        nursery.cancel_scope.cancel()


def test_a_file_that_others_can_read_holds_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_text(_SECRET)
    for mode in (0o640, 0o604, 0o660, 0o620):
        path.chmod(mode)
        with pytest.raises(BadURI, match=f"open to other users .mode {mode:04o}.*chmod 600 '.*a file'"):
            read_secret(str(path))
    path.chmod(0o600)
    assert read_secret(str(path)) == _SECRET.encode().rstrip()
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(BadURI, match="belongs to user 65534"):
            read_secret(str(path))


def test_what_is_no_secret_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(BadURI, match="there is no such file"):
        read_secret(str(path))
    for text in ("", "short\n", "x" * 5000):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(BadURI, match="must have 16 to 4096 bytes"):
            read_secret(str(path))
    with pytest.raises(BadURI, match="no regular file"):
        read_secret("/dev/null")
    subprocess.run(["mkfifo", "-m", "600", str(tmp_path / "fifo")], check=True)
    with pytest.raises(BadURI, match="no regular file"):
        read_secret(str(tmp_path / "fifo"))


@pytest.fixture(autouse=True)
def _log_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvmmig")
