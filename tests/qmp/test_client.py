"""The client: against a monitor, and against those that only look like one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.qmp import QMPClient, QMPError

from .conftest import PATIENCE, Commands, RawClient, Served, descriptors, same

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@pytest.fixture
async def client(served: Served) -> AsyncIterator[QMPClient]:
    async with QMPClient.connect(served.address) as client:
        yield client


async def test_it_asks_and_is_answered(client: QMPClient) -> None:
    assert client.greeting["version"]["package"] == "kvmmig 0.4.1"
    assert await client.execute("hello") == {}
    assert await client.execute("echo", {"text": "\u00e9"}) == {"text": "\u00e9"}
    with pytest.raises(QMPError, match="Parameter 'text' is missing"):
        await client.execute("echo", {})
    with pytest.raises(QMPError, match="Device 'x' not found") as caught:
        await client.execute("gone")
    assert caught.value.error_class == "DeviceNotFound"


async def test_what_the_block_raises_comes_out_as_it_is(served: Served) -> None:
    with pytest.raises(ZeroDivisionError):
        async with QMPClient.connect(served.address):
            raise ZeroDivisionError


async def test_tcp_works_too(served: Served, nursery: trio.Nursery) -> None:
    async with QMPClient.connect(await nursery.start(served.server.serve, "tcp::0")) as client:
        assert await client.execute("hello") == {}
        with pytest.raises(QMPError, match="over a Unix socket only"):
            await client.execute("getfd", {"fdname": "a"}, fds=[0])


async def test_many_tasks_ask_at_once_and_each_gets_its_own(client: QMPClient) -> None:
    async def ask(who: int) -> None:
        for i in range(20):
            text = f"{who} {i}"
            assert await client.execute("echo", {"text": text}) == {"text": text}

    async with trio.open_nursery() as nursery:
        for who in range(50):
            nursery.start_soon(ask, who)


async def test_a_reply_comes_through_while_another_task_waits_for_events(
    client: QMPClient, served: Served, commands: Commands
) -> None:
    seen: list[str] = []

    async def watch() -> None:
        async for event in client.events():
            seen.append(event.name)
            if event.name == "RESUME":
                break

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for _ in range(5):
            assert await client.execute("hello") == {}
            served.server.emit("STOP")
        served.server.emit("RESUME")
    assert seen == ["STOP"] * 5 + ["RESUME"]


async def test_events_are_kept_in_order_until_somebody_wants_them(client: QMPClient, served: Served) -> None:
    before = time.time()
    for i in range(3):
        served.server.emit("MIGRATION_PASS", {"pass": i})
    await client.execute("hello")
    events = client.events()
    for i in range(3):
        event = await anext(events)
        assert (event.name, event.data) == ("MIGRATION_PASS", {"pass": i})
        assert before - 1 < event.timestamp < time.time() + 1


async def test_events_that_nobody_wants_are_counted_and_the_oldest_go(
    client: QMPClient, served: Served
) -> None:
    for i in range(1500):
        served.server.emit("MIGRATION_PASS", {"pass": i})
    await client.execute("hello")
    assert client.dropped_events == 500
    assert (await client.next_event()).data == {"pass": 500}


async def test_a_cancelled_command_leaves_the_client_usable(client: QMPClient, commands: Commands) -> None:
    with trio.move_on_after(0.05) as cancelled:
        await client.execute("wait")
    assert cancelled.cancelled_caught
    commands.go.set()
    assert await client.execute("hello") == {}
    assert await client.execute("echo", {"text": "a"}) == {"text": "a"}


async def test_a_descriptor_goes_with_its_command_and_stays_the_callers(
    client: QMPClient, commands: Commands
) -> None:
    read, write = os.pipe()
    before = descriptors()
    await client.execute("getfd", {"fdname": "sink"}, fds=[write])
    await client.execute("hello")
    assert same(commands.sessions[0].fds["sink"], write)
    await client.execute("closefd", {"fdname": "sink"})
    assert descriptors() == before
    os.close(read)
    os.close(write)


async def test_closing_it_ends_whatever_waits(served: Served) -> None:
    async with QMPClient.connect(served.address) as client:

        async def watch() -> None:
            async for _ in client.events():
                pass

        async def ask() -> None:
            with pytest.raises(ChannelClosed, match="was closed by this side"):
                await client.execute("wait")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            client.close()
    with pytest.raises(ChannelClosed):
        await client.execute("hello")


# Those that only look like a monitor.

Play = Callable[[RawClient], Awaitable[None]]


@pytest.fixture
async def acting(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Callable[[Play], Awaitable[str]]]:
    """Have somebody listen who plays a part for each client."""

    async def listen(play: Play) -> str:
        path = f"{tmp_path}/other.sock"

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await play(RawClient(stream))

        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(path)
        sock.listen()
        nursery.start_soon(trio.serve_listeners, handle, [trio.SocketListener(sock)])
        return f"unix:{path}"

    with trio.fail_after(PATIENCE):
        yield listen


async def greet(peer: RawClient) -> None:
    await peer.send(GREETING)
    request = json.loads(await peer.line())
    await peer.send(json.dumps({"return": {}, "id": request["id"]}) + "\n")


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        (b"", "has closed the connection"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not speak QMP"),
        (b"[1]\r\n", "does not speak QMP"),
        (b'{"error": {"class": "GenericError", "desc": "too many"}}\r\n', "says: too many"),
    ],
)
async def test_who_does_not_speak_qmp_is_found_out(
    acting: Callable[[Play], Awaitable[str]], says: bytes, sentence: str
) -> None:
    address = await acting(lambda peer: peer.send(says))
    with pytest.raises(ConnectFailed, match=sentence):
        async with QMPClient.connect(address):
            pass


async def test_who_does_not_answer_is_not_waited_for(acting: Callable[[Play], Awaitable[str]]) -> None:
    async def say_nothing(_: RawClient) -> None:
        await trio.sleep_forever()

    address = await acting(say_nothing)
    with pytest.raises(ConnectFailed, match=r"has not answered for 0\.05 s"):
        async with QMPClient.connect(address, timeout=0.05):
            pass


async def test_who_sends_without_an_end_is_left(
    acting: Callable[[Play], Awaitable[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmmig.qmp.client._LONGEST_LINE", 1 << 20)

    async def endless(peer: RawClient) -> None:
        with suppress(trio.BrokenResourceError):
            while True:
                await peer.send(b"x" * 65536)

    with pytest.raises(ConnectFailed, match="a message of more than 1048576 bytes"):
        async with QMPClient.connect(await acting(endless)):
            pass


async def test_a_monitor_that_is_gone_is_a_broken_channel_for_all(
    acting: Callable[[Play], Awaitable[str]],
) -> None:
    async def leave(peer: RawClient) -> None:
        await greet(peer)
        for _ in range(3):
            await peer.line()

    async with QMPClient.connect(await acting(leave)) as client:

        async def ask() -> None:
            with pytest.raises(ChannelBroken, match=r"other\.sock has closed the connection"):
                await client.execute("hello")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        await ask()
        with pytest.raises(ChannelBroken):
            await anext(client.events())


async def test_a_command_that_was_cut_by_a_cancel_is_ended_before_the_next(
    acting: Callable[[Play], Awaitable[str]],
) -> None:
    got: list[dict[str, Any]] = []
    listen = trio.Event()
    cut = trio.CancelScope()

    async def deaf_at_first(peer: RawClient) -> None:
        await greet(peer)
        begun_with = await peer.stream.receive_some(1)
        cut.cancel()
        await listen.wait()
        while line := begun_with + await peer.line():
            begun_with = b""
            got.append(json.loads(line))
            await peer.send(json.dumps({"return": len(got), "id": got[-1]["id"]}) + "\n")

    async with QMPClient.connect(await acting(deaf_at_first)) as client:
        with cut:
            await client.execute("first", {"text": "x" * 5_000_000})
        with trio.move_on_after(0.05) as never_begun:  # what was cut comes first, and nobody takes it
            await client.execute("never", fds=[0])
        assert cut.cancelled_caught
        assert never_begun.cancelled_caught
        listen.set()
        assert await client.execute("last") == 2
    assert [message["execute"] for message in got] == ["first", "last"]


async def test_events_may_be_left_in_the_middle(served: Served) -> None:
    """The iterator needs no closing, but does no harm to those who close whatever they can."""
    async with QMPClient.connect(served.address) as client:
        served.server.emit("STOP")
        served.server.emit("RESUME")
        async for event in client.events():
            assert event.name == "STOP"
            break
        assert (await client.next_event()).name == "RESUME"
