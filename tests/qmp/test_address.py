"""Where a monitor listens, and who may come in."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.qmp.address import Address, FdAddress, TcpAddress, UnixAddress, parse_address
from kvmmig.qmp.endpoint import connect, open_listener

from .conftest import PATIENCE


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a.sock", UnixAddress("/run/a.sock")),
        ("unix:a:b,,c", UnixAddress("a:b,c")),
        ("unix:/a,server=on,wait=off", UnixAddress("/a")),
        ("unix:/a,server,nowait", UnixAddress("/a")),
        ("unix:/a,server=on", UnixAddress("/a", waits=True)),
        ("unix:/a,server=off", UnixAddress("/a", connects=True)),
        ("unix:/a,wait=off", UnixAddress("/a", connects=True)),
        ("tcp:h:1,server=on,wait=off,insecure=on", TcpAddress("h", 1, asks_nobody=True)),
        ("tcp:h:1,server=no", TcpAddress("h", 1, connects=True)),
        ("fd:3", FdAddress(3)),
        ("fd:3,server=on,wait=off", FdAddress(3)),
        ("fd:3,insecure=on", FdAddress(3, asks_nobody=True)),
        ("socket,id=m,path=/a,,b,server=on,wait=off", UnixAddress("/a,b")),
        ("socket,id=m,path=/a", UnixAddress("/a", connects=True)),
        ("socket,id=m,host=::1,port=7", TcpAddress("::1", 7, connects=True)),
        ("socket,id=m,fd=4", FdAddress(4)),
        ("tcp:example.org:4444", TcpAddress("example.org", 4444)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp::65535", TcpAddress("127.0.0.1", 65535)),
        ("tcp:h:1,insecure=on", TcpAddress("h", 1, asks_nobody=True)),
        ("tcp:h:1,insecure=off", TcpAddress("h", 1)),
        ("tcp:[::1]:1,secret-file=/a,,b=c d", TcpAddress("::1", 1, secret_file="/a,b=c d")),
        ("tcp:h:1,secret-file=/a,insecure=off", TcpAddress("h", 1, secret_file="/a")),
    ],
)
def test_an_address_is_parsed(text: str, address: Address) -> None:
    assert parse_address(text) == address
    # Who connects there knows nothing of whom the monitor waits for.
    assert parse_address(str(address)) == replace(address, waits=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a monitor's address: write unix:PATH"),
        ("unix", "is not a monitor's address"),
        ("unix:", "names no socket"),
        ("unix:/" + 107 * "x", "the path has 108 bytes, and a socket's may have 107"),
        ("tcp:4444", "is not a monitor's address"),
        ("tcp:host:65536", "is not a monitor's address"),
        ("tcp:::1:4444", "is not a monitor's address"),
        ("udp:host:1", "is not a monitor's address"),
        ("/run/a.sock", "is not a monitor's address"),
        ("tcp:h:1,", "behind a comma come options"),
        ("tcp:h:1,secret-file", "behind a comma come options"),
        ("tcp:h:1,insecure=aye", "insecure=aye is not understood"),
        ("unix:/a,b", "behind a comma come options"),
        ("unix:/a,reconnect=1", "has no option 'reconnect'; there are server=on"),
        ("unix:/a,secret-file=/b", "has no option 'secret-file'"),
        ("unix:/a,server=off,wait=on", "connects, so it waits for nobody"),
        ("socket,id=m", "names no socket: give path=PATH"),
        ("socket,host=h,server=on", "names no socket"),
        ("fd:", "names no descriptor"),
        ("fd:-1", "names no descriptor"),
        ("fd:a", "names no descriptor"),
        ("tcp:h:1,secret-file=", "secret-file= is not understood"),
        ("tcp:h:1,secret-file=a\0b", "is not understood"),
        ("tcp:h:1,telnet=on", "has no option 'telnet'; there are server=on.* insecure=on"),
        ("tcp:h:1,insecure=on,insecure=off", "gives 'insecure' twice"),
        ("tcp:h:1,insecure=on,secret-file=/a", "with a secret it is not insecure"),
    ],
)
def test_what_is_no_address_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadURI, match=sentence):
        parse_address(text)


async def test_a_socket_is_never_anybody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the umask, and from the moment it has a name."""
    path = tmp_path / "a.sock"
    seen: list[int] = []
    bind = socket.socket.bind

    def observed(self: socket.socket, address: str) -> None:
        bind(self, address)
        seen.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(socket.socket, "bind", observed)
    former = os.umask(0)
    try:
        async with open_listener(UnixAddress(str(path))):
            pass
    finally:
        os.umask(former)
    assert seen == [0o600]
    assert os.listdir(tmp_path) == []


async def test_a_cancelled_listener_removes_its_socket(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with open_listener(UnixAddress(f"{tmp_path}/a.sock")) as listening:
            scope.cancel()
            await listening.socket.accept()
    assert os.listdir(tmp_path) == []


async def test_a_dead_monitors_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/a.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address.path)
    async with open_listener(address) as living:
        with pytest.raises(ConnectFailed, match="another process listens there already"):
            async with open_listener(address):
                pass
        with trio.fail_after(PATIENCE):
            (await connect(address)).close()
            (await living.socket.accept())[0].close()


async def test_what_somebody_else_has_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("a letter")
    with pytest.raises(ConnectFailed, match="something that is no socket has that name"):
        async with open_listener(UnixAddress(str(path))):
            pass
    path.unlink()
    async with open_listener(UnixAddress(str(path))):
        path.unlink()
        path.write_text("a letter")
    assert path.read_text() == "a letter"


@pytest.mark.parametrize(
    ("text", "listens"),
    [
        ("tcp::0", "tcp:127.0.0.1:"),
        ("tcp:localhost:0", "tcp:"),
        ("tcp:0.0.0.0:0,insecure=on", "tcp:0.0.0.0:"),
    ],
)
async def test_tcp_says_where_it_listens(text: str, listens: str) -> None:
    async with open_listener(parse_address(text)) as listening:
        assert str(listening.address).startswith(listens)
        assert isinstance(listening.address, TcpAddress)
        assert listening.address.port != 0
        with trio.fail_after(PATIENCE):
            (await connect(listening.address)).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
async def test_an_address_that_others_can_reach_needs_a_secret_or_a_word(host: str) -> None:
    for options in ("", ",insecure=off"):
        with pytest.raises(BadURI, match=r"tcp:127\.0\.0\.1:PORT .*,secret-file=PATH .*,insecure=on"):
            async with open_listener(parse_address(f"tcp:{host}:0{options}")):
                pass


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tcp:192.0.2.1:0,insecure=on", "that address is not one of this host's"),
        ("tcp:no.such.host.invalid:1", "can't be resolved"),
        ("unix:/nonsense/a.sock", "there is no such file or directory"),
        ("unix:/proc/a.sock", "can't listen on unix:/proc/a.sock"),
    ],
)
async def test_what_can_not_be_listened_on_is_one_sentence(address: str, sentence: str) -> None:
    with pytest.raises(ConnectFailed, match=sentence):
        async with open_listener(parse_address(address)):
            pass


async def test_what_can_not_be_reached_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/dead")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (tmp_path / "file").touch()
    for address, sentence in (
        (f"unix:{tmp_path}/none", "there is no such socket"),
        (f"unix:{tmp_path}/dead", "nobody listens there"),
        (f"unix:{tmp_path}/file", "nobody listens there"),
        (f"tcp:127.0.0.1:{port}", "nobody listens there"),
    ):
        with pytest.raises(ConnectFailed, match=sentence):
            await connect(parse_address(address))


async def test_a_listener_whose_queue_is_full_is_waited_for(tmp_path: Path) -> None:
    address = UnixAddress(f"{tmp_path}/a.sock")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(address.path)
        busy.listen(0)
        first.connect(address.path)
        with trio.move_on_after(0.1) as waited:
            await connect(address)
        assert waited.cancelled_caught
        busy.accept()[0].close()
        with trio.fail_after(PATIENCE):
            (await connect(address)).close()
