"""Descriptors that a client passes: who has them open, and until when."""

from __future__ import annotations

import array
import json
import os
import socket

import trio

from .conftest import Commands, Served, descriptors, error, same


async def pass_fds(client: trio.SocketStream, data: bytes, fds: list[int]) -> None:
    await client.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def named(name: str) -> bytes:
    return json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()


async def test_a_descriptor_gets_a_name_and_the_session_keeps_it(served: Served, commands: Commands) -> None:
    client = await served.negotiated()
    read, write = os.pipe()
    await pass_fds(client.stream, named("sink"), [write])
    os.close(write)
    assert await client.next() == {"return": {}}
    await client.ask({"execute": "hello"})
    fd = commands.sessions[0].fds["sink"]
    assert not os.get_inheritable(fd)
    os.write(fd, b"x")
    assert os.read(read, 2) == b"x"
    await client.stream.aclose()
    await served.until(lambda: served.server.clients == 0)
    assert os.read(read, 1) == b""  # nobody has it open any more
    os.close(read)


async def test_descriptors_are_taken_in_their_order_and_a_name_has_one(
    served: Served, commands: Commands
) -> None:
    before = descriptors()
    client = await served.negotiated()
    fds = [os.open(name, os.O_RDONLY) for name in ("/", "/proc", "/dev/null")]
    await pass_fds(client.stream, named("a") + named("a") + named("b") + b'{"execute": "hello"}', fds)
    assert [await client.next() for _ in range(4)] == [{"return": {}}] * 4
    session = commands.sessions[0]
    assert same(session.fds["a"], fds[1])
    assert same(session.fds["b"], fds[2])
    close = {"execute": "closefd", "arguments": {"fdname": "a"}}
    assert await client.ask(close) == {"return": {}}
    assert await client.ask(close) == error("File descriptor named 'a' not found")
    assert session.fds.keys() == {"b"}
    for fd in fds:
        os.close(fd)
    await client.stream.aclose()
    await served.until(lambda: served.server.clients == 0)
    assert descriptors() <= before


async def test_bad_names_and_missing_descriptors_are_qemus_errors(served: Served) -> None:
    client = await served.negotiated()
    before = descriptors()
    assert await client.ask(named("a")) == error("No file descriptor supplied via SCM_RIGHTS")
    for name in ("1a", ""):
        await pass_fds(client.stream, named(name), [0])
        wanted = error("Parameter 'fdname' expects a name not starting with a digit")
        assert await client.next() == wanted
    assert descriptors() == before


async def test_more_descriptors_than_anybody_needs_are_closed(served: Served) -> None:
    client = await served.negotiated()
    before = descriptors()
    for _ in range(10):
        await pass_fds(client.stream, b'{"execute": "hello"}', [0] * 100)
        assert await client.next() == {"return": {}}
    assert len(descriptors() - before) == 16
    for i in range(64):
        await pass_fds(client.stream, named(f"a{i}"), [0])
        assert await client.next() == {"return": {}}
    await pass_fds(client.stream, named("one-more"), [0])
    assert "64 descriptors have names already" in (await client.next())["error"]["desc"]
    await client.stream.aclose()
    await served.until(lambda: served.server.clients == 0)
    assert len(descriptors() - before) == 0
