"""Whatever a client sends: the monitor lives, leaks nothing, and answers the others."""

from __future__ import annotations

import array
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import trio

from kvmmig.qmp import QMPClient

from .conftest import Commands, RawClient, Served, descriptors

_REQUESTS = [
    {"execute": "hello"},
    {"execute": "hello", "id": {"a": [1, 2.5, None, "\u00e9\U0001f600"]}},
    {"execute": "echo", "arguments": {"text": '\\"{}[]', "number": -7}, "id": "x"},
    {"execute": "echo", "arguments": {"text": "a", "max-size": 1e300, "switches": [True, False]}},
    {"execute": "getfd", "arguments": {"fdname": "a"}},
    {"execute": "closefd", "arguments": {"fdname": "a"}},
    {"execute": "query-commands", "id": 3},
    {"execute": "qmp_capabilities", "arguments": {"enable": []}},
    {"execute": "refuse", "id": []},
    {"exec-oob": "hello"},
]
_PIECES = [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\xff", b"\0", b"\x80", b"\\u", b"null"]
_PIECES += [b"1e999", b"-", b"9" * 400, b"[" * 300, b'{"a":' * 300, b'"' + b"x" * 70_000, b"\xed\xa0\x80"]


def hostile_inputs(seed: int, count: int) -> Iterator[bytes]:
    """Requests that were cut, mixed and spoilt, and bytes that never were any."""
    choose = random.Random(seed)
    texts = [json.dumps(request, ensure_ascii=False).encode() for request in _REQUESTS]
    for _ in range(count):
        if choose.random() < 0.1:
            yield choose.randbytes(choose.randrange(100))
            continue
        data = bytearray(b"".join(choose.choices(texts, k=choose.randrange(1, 4))))
        for _ in range(choose.randrange(5)):
            at = choose.randrange(len(data) + 1)
            match choose.randrange(5):
                case 0:
                    data[at:at] = choose.choice(_PIECES)
                case 1:
                    del data[at : at + choose.randrange(1, 10)]
                case 2:
                    data[at : at + 1] = choose.randbytes(1)
                case 3:
                    data[at:at] = data[: choose.randrange(len(data) + 1)]
                case 4:
                    del data[at:]
        yield bytes(data)


async def torment(served: Served, seed: int, count: int) -> None:
    """Send so many hostile inputs, over many connections; after each the monitor still makes sense."""
    choose = random.Random(seed)
    client: RawClient | None = None
    for number, data in enumerate(hostile_inputs(seed, count)):
        if client is None:
            client = RawClient(await trio.open_unix_socket(served.address.removeprefix("unix:")))
            if choose.random() < 0.9:
                await client.negotiate()
        if choose.random() < 0.05:
            fds = array.array("i", [0] * choose.randrange(1, 30))
            await client.stream.socket.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        step = choose.choice([7, 100_000] if len(data) < 500 else [5000, 100_000])
        for start in range(0, len(data), step):
            await client.send(data[start : start + step])
        if choose.random() < 0.02:  # whatever it was in the middle of
            await client.stream.aclose()
            client = None
            continue
        await client.send(b'\xff\n{"execute": "hello", "id": "still there? %d"}' % number)
        while (await client.next()).get("id") != f"still there? {number}":
            pass
    if client is not None:
        await client.stream.aclose()


async def be_polite(address: str, asked: list[int]) -> None:
    async with QMPClient.connect(address) as client:
        while True:
            text = str(len(asked))
            assert await client.execute("echo", {"text": text}) == {"text": text}
            asked.append(len(asked))
            await trio.sleep(0.001)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_hostile_input_disturbs_nobody(served: Served, count: int) -> None:
    seed = int(os.environ.get("KVMMIG_SEED", random.randrange(2**32)))
    print(f"{count} inputs, KVMMIG_SEED={seed}")
    tasks, before = trio.lowlevel.current_statistics().tasks_living, descriptors()
    asked: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_polite, served.address, asked)
        await torment(served, seed, count)
        so_far = len(asked)
        await served.until(lambda: len(asked) > so_far)
        nursery.cancel_scope.cancel()
    await served.until(lambda: served.server.clients == 0)
    await served.until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
    assert so_far, "it was served all the while"
    assert descriptors() == before


async def test_one_floods_one_never_reads_and_a_third_is_served(served: Served, commands: Commands) -> None:
    flooding, deaf = await served.negotiated(), await served.negotiated()
    asked: list[int] = []

    async def flood() -> None:
        await flooding.send(b'{"execute": "hello"}' * 10_000)

    async def never_read() -> None:
        while True:
            await deaf.send(b'{"execute": "big"}' * 100)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_polite, served.address, asked)
        nursery.start_soon(never_read)
        await served.until(lambda: bool(asked))
        nursery.start_soon(flood)
        for _ in range(10_000):
            assert await flooding.next() == {"return": {}}
        while len(asked) < 100:
            served.server.emit("STOP")
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert served.server.clients >= 2  # the deaf one has 30 s


async def test_pipelined_commands_do_not_hold_the_loop(served: Served, commands: Commands) -> None:
    """After each that takes longer than half a millisecond, whoever else wants to run does so."""
    turns: list[int] = []
    done = 0

    async def busy(*_: object) -> None:
        nonlocal done
        time.sleep(0.001)  # noqa: ASYNC251 - at least so long, on any host
        done += 1

    async def take_turns() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            turns.append(done)

    commands.table.add("busy", None, busy)
    client = await served.negotiated()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await client.send(b'{"execute": "busy"}' * 50)
        for _ in range(50):
            assert await client.next() == {"return": {}}
        nursery.cancel_scope.cancel()
    # Both have a turn in each of trio's batches, in any order.
    assert max(after - before for before, after in pairwise(turns)) <= 2
