"""QEMU's own client, the PyPI package qemu.qmp, drives machines unchanged; so does its shell."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.monitor.processes import PATIENCE, MachineProcess, awaiting, dirtier

pytestmark = pytest.mark.kvm
SCRIPT = Path(__file__).with_name("qemu_script.py")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as path:
        yield Path(path)


@asynccontextmanager
async def connected(machine: MachineProcess) -> AsyncIterator[QMPClient]:
    client = QMPClient(Path(machine.socket).stem)
    await client.connect(machine.socket)
    try:
        yield client
    finally:
        with suppress(EOFError):  # as from QEMU, when it is gone
            await client.disconnect()


async def where_it_listens(client: QMPClient) -> str:
    info: Any = {}
    while "socket-address" not in info:  # its monitor answers before it listens for a guest
        info = await client.execute("query-migrate")
        await asyncio.sleep(0.001)
    address = info["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


async def with_events(client: QMPClient) -> None:
    capability = {"capability": "events", "state": True}
    await client.execute("migrate-set-capabilities", {"capabilities": [capability]})


def test_it_watches_a_migration_to_its_end_and_reads_the_figures(place: Path) -> None:
    async def drive(here: MachineProcess, there: MachineProcess) -> None:
        async with connected(here) as source, connected(there) as destination:
            await watch(source, destination)

    async def watch(source: QMPClient, destination: QMPClient) -> None:
        commands: Any = await source.execute("query-commands")
        assert {"migrate", "query-migrate", "getfd"} <= {one["name"] for one in commands}
        await with_events(source)
        seen: list[str] = []
        with source.listener() as listener:
            await source.execute("migrate", {"uri": await where_it_listens(destination)})
            with pytest.raises(ExecuteError, match="migration process in progress"):
                await source.execute("migrate", {"uri": "tcp:127.0.0.1:1"})
            async for message in listener:
                event: Any = message
                seen.append(event["data"]["status"] if event["event"] == "MIGRATION" else event["event"])
                assert set(event["timestamp"]) == {"seconds", "microseconds"}
                if seen[-1] in ("completed", "failed"):
                    break
        assert [name for name in seen if name != "MIGRATION_PASS"] == [
            *("setup", "active", "STOP", "device", "completed")
        ]
        assert seen[:3] == ["setup", "MIGRATION_PASS", "active"]
        info: Any = await source.execute("query-migrate")
        assert info["ram"]["transferred"] > 0
        assert info["downtime"] >= 0
        status: Any = await destination.execute("query-status")
        assert status["running"]
        with pytest.raises(ExecuteError, match="moved away"):
            await source.execute("cont")
        with destination.listener("SHUTDOWN") as shutdown:
            await destination.execute("quit")
            assert dict(await shutdown.get())["data"] == {"guest": False, "reason": "host-qmp-quit"}

    with dirtier(place) as here, awaiting(place) as there:
        asyncio.run(asyncio.wait_for(drive(here, there), PATIENCE))
        assert there.wait() == 0


def test_it_cancels_a_migration_onto_a_slow_sink(place: Path) -> None:
    async def drive(here: MachineProcess, there: MachineProcess) -> None:
        async with connected(here) as source, connected(there) as destination:
            await cancel(source, destination)
            status: Any = await destination.execute("query-status")
            assert status["status"] == "inmigrate", "another source may come"
            await destination.execute("quit")

    async def cancel(source: QMPClient, destination: QMPClient) -> None:
        await with_events(source)
        with source.listener("MIGRATION") as listener:
            uri = await where_it_listens(destination)
            await source.execute("migrate", {"uri": f"throttle+{uri}?throttle.rate=1MB/s"})
            async for message in listener:
                event: Any = message
                if event["data"]["status"] == "active":
                    await source.execute("migrate_cancel")
                if event["data"]["status"] in ("cancelled", "failed", "completed"):
                    assert event["data"]["status"] == "cancelled"
                    break
        status: Any = await source.execute("query-status")
        assert status == {"status": "running", "running": True}

    with dirtier(place) as here, awaiting(place) as there:
        asyncio.run(asyncio.wait_for(drive(here, there), PATIENCE))
        assert there.wait() == 0


def test_a_script_written_for_qemus_monitor_runs_as_it_is(place: Path) -> None:
    with dirtier(place) as here, awaiting(place, f"unix:{place}/guest"):
        while not (place / "guest").exists():
            time.sleep(0.001)
        script = subprocess.run(
            [sys.executable, str(SCRIPT), here.socket, f"unix:{place}/guest"],
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
            check=True,
        )
    info = json.loads(script.stdout)
    assert info["status"] == "completed"
    assert info["ram"]["remaining"] == 0


def test_a_guest_leaves_through_a_descriptor_to_any_program_and_comes_back(place: Path) -> None:
    """The story that this project comes from: a pipe, and a helper that writes what comes out of it."""

    async def save(here: MachineProcess, writer: int) -> None:
        async with connected(here) as source:
            source.send_fd_scm(writer)
            await source.execute("getfd", {"fdname": "migstream"})
            os.close(writer)
            await source.execute("migrate", {"uri": "fd:migstream"})
            info: Any = {"status": "setup"}
            while info["status"] not in ("completed", "failed"):
                info = await source.execute("query-migrate")
                await asyncio.sleep(0.001)
            assert info["status"] == "completed", info

    saved = place / "guest.img"
    with dirtier(place) as here, saved.open("wb") as file:
        reader, writer = os.pipe()
        with subprocess.Popen(["cat"], stdin=reader, stdout=file) as helper:
            os.close(reader)
            asyncio.run(asyncio.wait_for(save(here, writer), PATIENCE))
            assert helper.wait(PATIENCE) == 0
    for uri in (f"file:{saved}", f"exec:cat {saved}"):
        with awaiting(place, uri) as there:
            assert asyncio.run(asyncio.wait_for(runs(there), PATIENCE))


async def runs(machine: MachineProcess) -> bool:
    """Wait until its guest is there; whether it runs."""
    async with connected(machine) as client:
        status: Any = {}
        while status.get("status") not in ("running", "paused"):
            status = await client.execute("query-status")
            await asyncio.sleep(0.001)
        return bool(status["running"])


def test_its_shell_takes_commands_from_a_person(place: Path) -> None:
    typed = (
        "cont",  # waits for the guest, which is being loaded
        "query-status",
        "stop",
        "query-status",
        "migrate-set-parameters downtime-limit=50",
        "query-migrate-parameters",
        "migrate uri=pigeon:coop",
        "nonsense",
        "cont",
    )
    with dirtier(place) as machine:
        shell = subprocess.run(
            [sys.executable, "-m", "qemu.qmp.qmp_shell", machine.socket],
            input="\n".join(typed) + "\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "HOME": str(place)},
        )
        people = subprocess.run(
            [sys.executable, "-m", "qemu.qmp.qmp_shell", "-H", machine.socket],
            input="info status\nmigrate_set_speed 32\nmigrate -d file:/nonexistent/x\nstop\ninfo status\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "HOME": str(place)},
        ).stdout
    assert people.index("VM status: running") < people.index("VM status: paused")
    assert "Error: Could not create '/nonexistent/x': No such file or directory" in people
    said = shell.stdout
    assert "Connected to QEMU 0." in said
    assert said.index('"status": "running"') < said.index('"status": "paused"')
    assert '"downtime-limit": 50' in said
    assert "no transport is called 'pigeon'" in said
    assert "CommandNotFound" in said
