"""What only an inherited descriptor can get wrong: what it is, and whose."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed
from kvmmig.transport import Channel, Transport, TransportURI
from kvmmig_transports import fd
from tests.transports.using import accept, connect

Make = Callable[[str | TransportURI], Transport]


async def test_a_socket_goes_both_ways(transport: Make) -> None:
    ours, theirs = (end.detach() for end in socket.socketpair())
    async with (
        transport(f"fd:{ours}").connect() as sender,
        transport(f"fd:{theirs}").listen() as listener,
        listener.accept() as receiver,
    ):
        assert isinstance(sender, Channel)
        assert isinstance(receiver, Channel)
        buffer = memoryview(bytearray(100))
        await sender.send_some([memoryview(b"there")])
        assert await receiver.receive_some(buffer) == 5
        await receiver.send_some([memoryview(b"back")])
        assert await sender.receive_some(buffer) == 4


async def test_a_tcp_socket_is_a_tcp_channel(transport: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    name = "{}:{}".format(*ours.getpeername())
    async with (
        transport(f"fd:{ours.detach()}").connect() as sender,
        transport(f"fd:{theirs.detach()}").listen() as listener,
        listener.accept() as receiver,
    ):
        assert sender.peer == name
        sender.abort()
        with pytest.raises(ChannelBroken, match="the other side cut the connection"):
            await receiver.receive_some(memoryview(bytearray(1)))
        receiver.abort()


async def test_a_pipe_goes_one_way_and_the_wrong_end_is_named(transport: Make) -> None:
    reading, writing = os.pipe()
    with pytest.raises(ConnectFailed, match="is a pipe's end for reading; give the one for writing"):
        await connect(transport(f"fd:{reading}"))
    with pytest.raises(ConnectFailed, match="is a pipe's end for writing; give the one for reading"):
        await accept(transport(f"fd:{writing}"))
    async with transport(f"fd:{writing}").connect() as sender:
        assert not sender.two_way
        os.close(reading)
        await sender.send_some([memoryview(b"x")])  # it is accepted, and then found to be undeliverable
        with pytest.raises(ChannelBroken, match=r"the reader of fd:.* has closed it"):
            await sender.flush()
        sender.abort()


async def test_a_flush_notices_that_the_reader_has_gone(transport: Make) -> None:
    reading, writing = os.pipe()
    async with transport(f"fd:{writing}").connect() as sender:
        await sender.send_some([memoryview(b"x")])
        os.close(reading)
        with pytest.raises(ChannelBroken, match=r"the reader of fd:\d+ has closed it"), trio.fail_after(60):
            await sender.flush()
        sender.abort()


async def test_its_mode_comes_back_for_those_who_share_it(transport: Make) -> None:
    for blocking in (True, False):
        reading, writing = os.pipe()
        shared = os.dup(writing)
        os.set_blocking(shared, blocking)
        async with transport(f"fd:{writing}").connect() as sender:
            assert not os.get_blocking(shared)
            await sender.aclose()
            assert os.get_blocking(shared) is blocking
            for each in (reading, shared):
                os.close(each)


async def test_it_is_taken_over(transport: Make) -> None:
    reading, writing = os.pipe()
    async with transport(f"fd:{writing}").connect() as channel:
        # Its number may be somebody else's by now.
        with contextlib.suppress(FileNotFoundError):
            assert os.readlink(f"/proc/self/fd/{writing}") != os.readlink(f"/proc/self/fd/{reading}")
        with pytest.raises(ConnectFailed, match=f"fd:{writing} is"):
            await connect(transport(f"fd:{writing}"))
        channel.abort()
        assert os.read(reading, 1) == b""
        os.close(reading)


async def test_it_is_one_connection(transport: Make) -> None:
    reading, writing = os.pipe()
    async with transport(f"fd:{reading}").listen() as listener:
        async with listener.accept() as channel:
            channel.abort()
        with pytest.raises(ConnectFailed, match="has been accepted already"):
            async with listener.accept():
                pass
    os.close(writing)


async def test_a_name_stands_for_a_descriptor_once(transport: Make) -> None:
    reading, writing = os.pipe()
    fd.register("channel-1", writing)
    await connect(transport("fd:channel-1"))
    assert os.read(reading, 1) == b""
    os.close(reading)
    with pytest.raises(ConnectFailed, match="fd:channel-1: no descriptor has that name"):
        await connect(transport("fd:channel-1"))
    for name in ("", "7"):
        with pytest.raises(ValueError, match="is no name for a descriptor"):
            fd.register(name, 7)


async def test_what_can_not_serve_is_one_sentence(transport: Make, tmp_path: Path) -> None:
    with pytest.raises(BadURI, match=r"names no descriptor: write fd:NUMBER"):
        transport("fd:")
    for number in ("99", "99999999999999999999"):
        with pytest.raises(ConnectFailed, match=f"descriptor {number} is not open"):
            await connect(transport(f"fd:{number}"))
    with (tmp_path / "a.img").open("wb") as file:
        with pytest.raises(ConnectFailed, match=r"is a regular file; use file:PATH"):
            await connect(transport(f"fd:{file.fileno()}"))
    device = os.open("/dev/null", os.O_WRONLY)
    with pytest.raises(ConnectFailed, match=r"is a character device; give a socket or a pipe"):
        await connect(transport(f"fd:{device}"))
    os.close(device)
    for made, why in (
        (socket.create_server(("127.0.0.1", 0)), "that listens"),
        (socket.socket(), "that is not connected"),
        (socket.socket(type=socket.SOCK_DGRAM), "another kind"),
    ):
        unfit = made.detach()
        with pytest.raises(ConnectFailed, match=why):
            await connect(transport(f"fd:{unfit}"))
        os.close(unfit)


async def test_no_descriptor_of_the_event_loop_or_of_a_live_socket_is_taken(transport: Make) -> None:
    before = set(os.listdir("/proc/self/fd"))
    sockets = [number for number in map(int, before) if number > 2 and "socket" in _link(number)]
    assert len(sockets) >= 2, "trio's own wakeup pair"
    polls = [number for number in map(int, before) if "eventpoll" in _link(number)]
    assert polls
    for number in (*sockets, *polls):
        for attempt in (connect, accept):
            with pytest.raises(ConnectFailed, match="in use by this process itself"):
                await attempt(transport(f"fd:{number}"))
    assert before <= set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("odd", ["-1", "+5", "00005", "５", "5x", "0x5"])
def test_what_looks_like_a_number_and_is_none_is_refused(transport: Make, odd: str) -> None:
    with pytest.raises(BadURI, match="with the digits 0 to 9 and nothing before them"):
        transport(f"fd:{odd}")


def _link(number: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{number}")
    return ""


def test_standard_input_stays_open_as_dev_null() -> None:
    program = (
        "import os, trio\n"
        "from kvmmig.transport import transport_for\n"
        "async def main():\n"
        "    async with transport_for('fd:0').listen() as listener, listener.accept() as channel:\n"
        "        buffer = memoryview(bytearray(100))\n"
        "        count = await channel.receive_some(buffer)\n"
        "        print(bytes(buffer[:count]).decode(), os.readlink('/proc/self/fd/0'))\n"
        "trio.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=b"hello", capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"hello /dev/null\n", b"")
