"""Drive machines from a script, by their monitors: two ``kvmmig run``, and a guest that moves between them.

python examples/drive_by_monitor.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from tempfile import TemporaryDirectory

import trio

from kvmmig import ConnectFailed, QMPClient
from kvmmig.units import format_duration

KVMMIG = [sys.executable, "-m", "kvmmig"]


@asynccontextmanager
async def machine(*options: str, monitor: str) -> AsyncIterator[QMPClient]:
    """A machine in a process of its own, and its monitor; ended with the block."""
    command = [*KVMMIG, "run", *options, "--qmp", monitor, "--serial", "/dev/null"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.run_process, command, stderr=subprocess.DEVNULL))
        with trio.fail_after(30):
            await wait_for(monitor)
        async with QMPClient.connect(monitor) as client:
            yield client
            await client.execute("quit")


async def wait_for(monitor: str) -> None:
    while True:
        try:
            async with QMPClient.connect(monitor):
                return
        except ConnectFailed:  # it is about to start
            await trio.sleep(0.05)


async def main() -> None:
    with TemporaryDirectory() as directory:
        async with (
            machine("--incoming", "defer", monitor=f"unix:{directory}/there.sock") as there,
            machine(
                "dirtier", "--memory", "64MiB", "--set", "hot=8MiB", monitor=f"unix:{directory}/here.sock"
            ) as here,
        ):
            await there.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
            (address,) = (await there.execute("query-migrate"))["socket-address"]

            await here.execute(
                "migrate-set-parameters", {"downtime-limit": 100, "max-bandwidth": 500_000_000}
            )
            events = [{"capability": "events", "state": True}]
            await here.execute("migrate-set-capabilities", {"capabilities": events})
            await here.execute("migrate", {"uri": f"tcp:{address['host']}:{address['port']}"})
            async for event in here.events():
                print(event.name, *event.data.values())
                if event.name == "MIGRATION" and event.data["status"] in ("completed", "failed"):
                    break

            figures = await here.execute("query-migrate")
            print(f"{figures['status']}: {figures['ram']['transferred']} bytes in {figures['total-time']} ms")
            print(f"the guest stood still for {format_duration(figures['downtime'] / 1000)}")
            while (await there.next_event()).name != "RESUME":
                pass
            for name, client in (("here", here), ("there", there)):
                print(f"{name}: {(await client.execute('query-status'))['status']}")


if __name__ == "__main__":
    trio.run(main)
