"""The serial port as a socket, and ``kvmmig console``."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.cli import rundir
from kvmmig.cli.consoleserver import BACKLOG, ConsoleServer, Ring

from .conftest import PATIENCE, Kvmmig
from .screens import Screen

Background = Callable[..., str]


@given(st.lists(st.binary(max_size=20)), st.integers(1, 16), st.lists(st.booleans()))
def test_a_ring_gives_each_reader_the_newest_of_what_it_has_not_had(
    writes: list[bytes], size: int, reads: list[bool]
) -> None:
    ring, position, written, had = Ring(size), 0, b"", 0
    for data, read in zip(writes, reads + [True] * len(writes), strict=False):
        ring.write(data)
        written += data
        if read:
            got, position = ring.read(position)
            assert got == written[had:][-size:]
            had = position
            assert had == len(written)


def test_a_writer_wakes_only_who_waits() -> None:
    ring = Ring()
    assert not ring.write(b"a")
    data, position = ring.read(0)
    assert data == b"a"
    assert not ring.write(b"")
    assert ring.read(position) == (b"", position)
    assert ring.write(b"b")
    assert not ring.write(b"c")


async def nobody(data: bytes) -> None:
    await trio.lowlevel.checkpoint()


async def watcher(path: Path) -> trio.SocketStream:
    return trio.SocketStream(await _connected(path))


async def _connected(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.connect(str(path))
    return sock


async def read_all(stream: trio.SocketStream) -> bytes:
    got = bytearray()
    async for data in stream:
        got += data
    return bytes(got)


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    got = b""
    while len(got) < count:
        data = await stream.receive_some(count - len(got))
        assert data
        got += data
    return got


async def test_who_comes_gets_the_last_64_kib_and_then_what_comes(runtime_directory: Path) -> None:
    path = runtime_directory.parent / "console"
    with trio.fail_after(PATIENCE):
        server = ConsoleServer(nobody)
        server.write(b"lost" + b"x" * (BACKLOG - 5) + b"last.")
        async with server.serving(path):
            assert path.stat().st_mode & 0o777 == 0o600
            async with await watcher(path) as one, await watcher(path) as other:
                for stream in (one, other):
                    assert await read_exactly(stream, BACKLOG) == b"x" * (BACKLOG - 5) + b"last."
                server.write(b"more")
                for stream in (one, other):
                    assert await read_exactly(stream, 4) == b"more"
        assert not path.exists()


async def test_a_watcher_who_reads_nothing_holds_up_neither_guest_nor_others(runtime_directory: Path) -> None:
    path = runtime_directory.parent / "console"
    with trio.fail_after(PATIENCE):
        server = ConsoleServer(nobody)
        async with server.serving(path), await watcher(path) as slow, await watcher(path) as quick:
            for number in range(200):  # ten times what the sockets hold
                server.write(b"%07d\n" % number * 8192)
                assert (await read_exactly(quick, 65536)).endswith(b"%07d\n" % number)
            first = await read_exactly(slow, 8)
            assert first == b"0000000\n"
            server.write(b"end")
            rest = b""
            while not rest.endswith(b"end"):
                rest = rest[-3:] + bytes(await slow.receive_some(65536))


async def test_the_last_words_are_heard_and_a_watcher_who_has_gone_is_forgotten(
    runtime_directory: Path,
) -> None:
    path = runtime_directory.parent / "console"
    with trio.fail_after(PATIENCE):
        server = ConsoleServer(nobody)
        async with trio.open_nursery() as nursery:
            heard: list[bytes] = []

            async def listen(stream: trio.SocketStream) -> None:
                async with stream:
                    heard.append(await read_all(stream))

            async with server.serving(path):
                async with await watcher(path):
                    pass
                nursery.start_soon(listen, await watcher(path))
                await trio.testing.wait_all_tasks_blocked()
                server.write(b"last words")
        assert heard == [b"last words"]


async def test_what_watchers_type_reaches_the_guest(runtime_directory: Path) -> None:
    path = runtime_directory.parent / "console"
    typed = bytearray()
    enough = trio.Event()

    async def feed(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        typed.extend(data)
        if len(typed) == 6:
            enough.set()

    with trio.fail_after(PATIENCE):
        async with (
            ConsoleServer(feed).serving(path),
            await watcher(path) as one,
            await watcher(path) as other,
        ):
            await one.send_all(b"abc")
            await other.send_all(b"abc")
            await enough.wait()


@pytest.mark.kvm
def test_a_pipe_is_typed_and_what_the_guest_says_comes_back(kvmmig: Kvmmig, background: Background) -> None:
    background("run", "echo", "--memory", "8MiB", "--name", "a")
    watching = kvmmig.start("console", "a")
    watching.wait_for(lambda it: "Ctrl-D" in it.stdout)  # said before anybody watched
    typing = kvmmig.start("console", "a", stdin=subprocess.PIPE)
    typing.type(b"a word\r")
    for each in (watching, typing):
        each.wait_for(lambda it: "a word\r\n" in it.stdout)
    typing.type(b"\x04")
    assert watching.end() == 0
    assert typing.end() == 0
    assert watching.stderr == ""


@pytest.mark.kvm
def test_in_the_foreground_it_works_too(kvmmig: Kvmmig) -> None:
    machine = kvmmig.start("run", "echo", "--memory", "8MiB", "--name", "a")
    machine.wait_for(lambda it: "Ctrl-D" in it.stdout)
    with socket.socket(socket.AF_UNIX) as plain:  # socat and minicom are as good
        plain.connect(str(rundir.files_of("a").console))
        plain.sendall(b"hey\x04")
        assert machine.end() == 0
        assert b"hey" in plain.recv(1000)
    assert machine.stdout.endswith("hey")


@pytest.mark.kvm
def test_a_terminal_gives_the_guest_every_key_but_one(background: Background, screen: Screen) -> None:
    background("run", "echo", "--memory", "8MiB", "--name", "a")
    screen.run("console", "a")
    screen.wait_for("Ctrl-] leaves it")
    screen.wait_for("Ctrl-D")
    screen.type(b"\x03\r\x1a\rstill here")  # Ctrl-C, Ctrl-Z
    screen.wait_for("still here")
    screen.type(b"\x1d")
    assert screen.end() == 0
    assert "'a' goes on without you" in screen.text()
