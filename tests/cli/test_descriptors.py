"""``fd:N`` means the descriptor that the person passed, and never one that a machine has opened itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.cli import rundir
from kvmmig.qmp.client import QMPClient
from kvmmig.qmp.messages import QMPError

from .conftest import PATIENCE

pytestmark = pytest.mark.kvm

SMALL = ("dirtier", "--memory", "16MiB", "--set", "hot=1MiB", "--name", "a")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]


def kvmmig(
    *arguments: str, cwd: Path, pass_fds: tuple[int, ...] = (), stdin: int = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmmig", *arguments],
        cwd=cwd,
        stdin=stdin,
        pass_fds=pass_fds,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def state(command: Command, name: str) -> str:
    told: str = json.loads(command("status", name, "--json")[1])["status"]
    return told


def open_numbers(pid: int) -> list[int]:
    return sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/fd"))


def test_no_number_of_the_machine_can_be_named_by_a_monitors_client(
    background: Background, command: Command
) -> None:
    background("run", *SMALL)
    pid = json.loads(command("status", "a", "--json")[1])["pid"]

    async def try_all() -> None:
        async with QMPClient.connect(f"unix:{rundir.files_of('a').monitor}") as client:
            for number in (*open_numbers(pid), 999):
                with pytest.raises(QMPError, match=r"was passed no such descriptor; .*'getfd'.*--pass-fd"):
                    await client.execute("migrate", {"uri": f"fd:{number}"})
                address = {"transport": "socket", "type": "fd", "str": str(number)}
                channels = [{"channel-type": "main", "addr": address}]
                with pytest.raises(QMPError, match="was passed no such descriptor"):
                    await client.execute("migrate", {"channels": channels})
                with pytest.raises(QMPError, match="was passed no such descriptor"):
                    await client.execute("migrate", {"uri": f"throttle+fd:{number}?throttle.rate=1MB/s"})
            for odd in ("-1", "+5", "00005", "５", "5x", "0x5"):
                with pytest.raises(QMPError, match="write its number with the digits 0 to 9"):
                    await client.execute("migrate", {"uri": f"fd:{odd}"})

    trio.run(try_all)
    assert state(command, "a") == "running"


def test_nor_by_one_whose_machine_waits_for_a_guest(background: Background, command: Command) -> None:
    background("run", "--incoming", "defer", "--name", "a")
    pid = json.loads(command("status", "a", "--json")[1])["pid"]

    async def try_all() -> None:
        async with QMPClient.connect(f"unix:{rundir.files_of('a').monitor}") as client:
            for number in open_numbers(pid):
                with pytest.raises(QMPError, match="was passed no such descriptor"):
                    await client.execute("migrate-incoming", {"uri": f"fd:{number}"})

    trio.run(try_all)
    assert state(command, "a") == "inmigrate"


def test_the_commands_own_descriptor_is_passed_along(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    reading, writing = os.pipe()
    with (tmp_path / "a.img").open("wb") as image:
        reader = subprocess.Popen(["cat"], stdin=reading, stdout=image)
    os.close(reading)
    moved = kvmmig("migrate", "a", f"fd:{writing}", cwd=tmp_path, pass_fds=(writing,))
    os.close(writing)
    assert moved.returncode == 0, moved.stderr
    assert reader.wait(PATIENCE) == 0
    with (tmp_path / "a.img").open("rb") as image:
        feeder = subprocess.Popen(["cat"], stdin=image, stdout=subprocess.PIPE)
        assert feeder.stdout is not None
        arrived = kvmmig(
            "run", "--incoming", "fd:0", "--name", "b", "--detach", cwd=tmp_path, stdin=feeder.stdout.fileno()
        )
        feeder.stdout.close()
        feeder.wait(PATIENCE)
    assert arrived.returncode == 0, arrived.stderr
    assert state(command, "b") == "running"


@pytest.mark.parametrize("number", ["3", "9"])
def test_a_number_that_the_command_was_not_started_with_is_refused(
    number: str, background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    for line in (
        ("migrate", "a", f"fd:{number}"),
        ("run", "--incoming", f"fd:{number}"),
        ("run", "hello", "--migrate-to", f"fd:{number}"),
        ("run", "hello", "--pass-fd", number),
    ):
        refused = kvmmig(*line, cwd=tmp_path)
        assert refused.returncode == 2
        assert f"was started without a descriptor {number}" in refused.stderr
    assert state(command, "a") == "running"


@pytest.mark.parametrize("odd", ["-1", "+5", "00005", "５", "", "NAME"])
def test_what_is_no_number_is_said_so(odd: str, command: Command) -> None:
    status, _, error = command("migrate", "a", f"fd:{odd}")
    assert status == 2
    assert "such as fd:" in error


def test_what_was_inherited_on_purpose_can_be_named_once(command: Command, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        started = kvmmig(
            "run", *SMALL, "--detach", "--pass-fd", str(number), cwd=tmp_path, pass_fds=(number,)
        )
    assert started.returncode == 0, started.stderr

    async def name_it() -> None:
        async with QMPClient.connect(f"unix:{rundir.files_of('a').monitor}") as client:
            await client.execute("migrate", {"uri": f"fd:{number}"})  # the other end has gone: it fails
            with trio.fail_after(PATIENCE):
                while (await client.execute("query-migrate")).get("status") != "failed":  # noqa: ASYNC110
                    await trio.sleep(0.01)
            with pytest.raises(QMPError, match="was passed no such descriptor"):
                await client.execute("migrate", {"uri": f"fd:{number}"})

    trio.run(name_it)
    assert state(command, "a") == "running"
    assert command("quit", "a")[0] == 0
