"""A real machine migrates while its monitor's other clients flood it, are deaf, or talk nonsense."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmmig.qmp import QMPClient
from tests.monitor.processes import MachineProcess, awaiting, dirtier
from tests.qmp.conftest import RawClient
from tests.qmp.test_hostile import hostile_inputs

pytestmark = pytest.mark.kvm

Disturbance = Callable[[str, trio.Nursery], Awaitable[None]]
ENDS = ("completed", "failed")
RATE = 50_000_000  # bytes a second: slow enough that there is time for all of it


@asynccontextmanager
async def negotiated(path: str) -> AsyncIterator[RawClient]:
    async with await trio.open_unix_socket(path) as stream:
        client = RawClient(stream)
        await client.negotiate()
        yield client


async def move(source: MachineProcess, there: MachineProcess, disturb: Disturbance) -> dict[str, Any]:
    """Move the guest, slowly, while it is disturbed; returns the figures when the guest goes on there."""
    with trio.fail_after(600):
        async with (
            QMPClient.connect(f"unix:{source.socket}") as here,
            QMPClient.connect(f"unix:{there.socket}") as far,
            trio.open_nursery() as nursery,
        ):
            while "socket-address" not in (awaited := await far.execute("query-migrate")):  # noqa: ASYNC110
                await trio.sleep(0.01)  # its monitor is there before it listens
            (address,) = awaited["socket-address"]
            await here.execute("migrate-set-parameters", {"max-bandwidth": RATE, "downtime-limit": 500})
            await here.execute("migrate", {"uri": f"tcp:{address['host']}:{address['port']}"})
            await disturb(source.socket, nursery)
            while (info := await here.execute("query-migrate"))["status"] not in ENDS:  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert info["status"] == "completed", info
            figures: dict[str, Any] = await here.execute("x-kvmmig-query-migration")
            assert (await far.execute("query-status"))["running"]
            nursery.cancel_scope.cancel()
    return figures


async def flood_and_be_deaf(path: str, nursery: trio.Nursery) -> None:
    """One client pipelines 10,000 commands, another asks for a lot and reads none of it."""

    async def never_read() -> None:
        async with negotiated(path) as deaf:
            while True:
                await deaf.send('{"execute": "query-commands"}' * 100)

    async def flood(flooding: RawClient) -> None:
        for number in range(0, 10_000, 100):
            requests = [
                {"execute": "query-name" if one % 2 else "query-status", "id": one}
                for one in range(number, number + 100)
            ]
            await flooding.send(" ".join(json.dumps(request) for request in requests))

    nursery.start_soon(never_read)
    async with negotiated(path) as flooding:
        nursery.start_soon(flood, flooding)
        for number in range(10_000):
            while "event" in (reply := await flooding.next()):
                pass  # the guest stops, and is gone
            assert reply["id"] == number
            assert reply["return"] == {"name": "a"} if number % 2 else "running" in reply["return"]


def talk_nonsense(seed: int, count: int) -> Disturbance:
    async def disturb(path: str, nursery: trio.Nursery) -> None:
        inputs = hostile_inputs(seed, count)
        while batch := list(islice(inputs, 50)):
            async with negotiated(path) as client:
                for number, data in enumerate(batch):
                    await client.send(data + b'\xff\n{"execute": "query-name", "id": "now? %d"}' % number)
                    while (reply := await client.next()).get("id") != f"now? {number}":
                        pass
                    assert reply["return"] == {"name": "a"}

    return disturb


def cause(name: str, count: int) -> Disturbance:
    if name == "flood":
        return flood_and_be_deaf
    seed = int(os.environ.get("KVMMIG_SEED", random.randrange(2**32)))
    print(f"{count} inputs, KVMMIG_SEED={seed}")
    return talk_nonsense(seed, count)


@pytest.mark.parametrize(
    ("name", "count"),
    [("flood", 0), ("nonsense", 500), pytest.param("nonsense", 100_000, marks=pytest.mark.slow)],
)
async def test_the_guest_moves_as_if_nobody_else_were_there(name: str, count: int, tmp_path: Path) -> None:
    # With a hundred thousand inputs the migration has ended long before them: then they hit a machine that
    # has moved away, which must be no easier to disturb.
    with dirtier(tmp_path, memory="64MiB", hot="2MiB") as source, awaiting(tmp_path) as there:
        figures = await move(source, there, cause(name, count))
        assert figures["phase"] == "done"
        assert figures["sent-bytes"] >= 62 << 20
        assert re.search(r"the guest 'dirtier' has arrived", there.said)
        # The guest checks each of its pages in every pass, and would end the machine with a failure.
        await trio.sleep(0.5)
        async with QMPClient.connect(f"unix:{there.socket}") as client:
            assert (await client.execute("query-status"))["running"]
