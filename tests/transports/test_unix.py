"""What only a Unix socket can get wrong: its file."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed
from kvmmig.transport import Listener, Transport, TransportURI

Make = Callable[[str | TransportURI], Transport]


async def _connect(transport: Transport) -> None:
    async with transport.connect() as channel:
        channel.abort()


async def _accept(listener: Listener) -> None:
    async with listener.accept() as channel:
        channel.abort()


async def _listen(transport: Transport) -> None:
    async with transport.listen():
        pass


@pytest.mark.parametrize(
    ("target", "sentence"), [("", "names no socket"), ("/" + 107 * "x", "has 108 bytes")]
)
def test_a_path_that_no_socket_can_have_is_refused(target: str, sentence: str, transport: Make) -> None:
    with pytest.raises(BadURI, match=sentence):
        transport(f"unix:{target}")


async def test_the_sockets_file_is_private_and_goes_with_the_listener(
    transport: Make, tmp_path: Path
) -> None:
    path = tmp_path / "a.sock"
    async with transport(f"unix:{path}").listen():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_a_cancelled_listener_removes_its_file_too(transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with trio.CancelScope() as scope:
        async with transport(f"unix:{path}").listen() as listener:
            scope.cancel()
            await _accept(listener)
    assert not path.exists()


async def test_a_file_that_somebody_else_has_put_there_stays(transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with transport(f"unix:{path}").listen():
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


async def test_a_dead_listeners_file_is_replaced(transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with transport(f"unix:{path}").listen():
        await _connect(transport(f"unix:{path}"))


async def test_a_living_listeners_file_is_not_and_it_notices_nothing(transport: Make, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/a.sock"
    async with transport(uri).listen() as listener:
        with pytest.raises(ConnectFailed, match="another process listens there already"):
            await _listen(transport(uri))
        with trio.move_on_after(0.1) as nobody:
            await _accept(listener)
        assert nobody.cancelled_caught


@pytest.mark.parametrize("kind", ["a regular file", "a directory"])
async def test_what_is_no_socket_is_not_touched(kind: str, transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir() if kind == "a directory" else path.touch()
    with pytest.raises(ConnectFailed, match=f"it is {kind}; name a path where nothing is"):
        await _listen(transport(f"unix:{path}"))
    assert path.exists()


async def test_what_can_not_be_reached_is_one_sentence(transport: Make, tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match="there is no such socket; start the other side first"):
        await _connect(transport(f"unix:{tmp_path}/none"))
    with pytest.raises(ConnectFailed, match="there is no such file or directory"):
        await _listen(transport(f"unix:{tmp_path}/none/a.sock"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(ConnectFailed, match="nobody listens there; start the other side first"):
        await _connect(transport(f"unix:{tmp_path}/dead"))


async def test_a_listener_with_no_room_is_waited_for(transport: Make, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(path)
        busy.listen(0)
        first.connect(path)
        with trio.move_on_after(0.1) as given_up:
            await _connect(transport(f"unix:{path}"))
        assert given_up.cancelled_caught
        busy.setblocking(False)
        over = trio.Event()

        async def connect() -> None:
            await _connect(transport(f"unix:{path}"))
            over.set()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
                while not over.is_set():  # what was given up may have come in late, and take the room again
                    with suppress(BlockingIOError):
                        busy.accept()[0].close()
                    await trio.sleep(0.01)


async def test_a_peer_that_is_gone_is_named(transport: Make, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/a.sock"
    async with transport(uri).listen() as listener, transport(uri).connect() as sender:
        await _accept(listener)
        with pytest.raises(
            ChannelBroken, match=rf"to {tmp_path}/a.sock is broken: the other side has closed"
        ):
            await sender.send_some([memoryview(b"x")])
        sender.abort()


async def test_a_bind_that_comes_too_late_leaves_nothing(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers only when the listen has been cancelled."""
    token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()
    given_up, removed = threading.Event(), trio.Event()
    bind, unlink = socket.socket.bind, os.unlink

    def late(self: socket.socket, path: str) -> None:
        token.run_sync_soon(scope.cancel)
        given_up.wait()
        bind(self, path)

    def observed(path: str) -> None:
        unlink(path)
        token.run_sync_soon(removed.set)

    monkeypatch.setattr(socket.socket, "bind", late)
    monkeypatch.setattr(os, "unlink", observed)
    with trio.fail_after(60):
        with scope:
            await _listen(transport(f"unix:{tmp_path}/a.sock"))
        given_up.set()
        assert scope.cancelled_caught
        await removed.wait()
    assert not os.listdir(tmp_path)
