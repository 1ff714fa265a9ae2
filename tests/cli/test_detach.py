"""``--detach``: a machine that goes on when the command that started it has returned."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.cli import rundir

from .conftest import PATIENCE, Kvmmig

pytestmark = pytest.mark.kvm

SMALL = ("--memory", "32MiB", "--set", "hot=2MiB")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]


def test_it_is_named_listed_and_ended(
    background: Background, command: Command, runtime_directory: Path
) -> None:
    assert background("run", "dirtier", *SMALL) == "dirtier"
    status, listed, _ = command("ls", "--json")
    (about,) = json.loads(listed)
    assert (status, about["name"], about["status"], about["memory"]) == (0, "dirtier", "running", 32 << 20)
    assert os.getsid(about["pid"]) == about["pid"]  # no terminal's hang-up ends it
    assert [os.readlink(f"/proc/{about['pid']}/fd/{fd}") for fd in (0, 1)] == [
        "/dev/null",
        str(runtime_directory / "dirtier.log"),
    ]
    assert command("quit", "dirtier") == (0, "", "")
    assert list(runtime_directory.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nonsense"], 2, "there is no guest 'nonsense'"),
        (["echo", "--qmp", "pigeon:home"], 2, "pigeon:home"),
        (["echo", "--qmp", "tcp:0.0.0.0:0"], 2, "can be reached from other hosts"),
        (["echo", "--serial", "absent/log"], 1, "--serial absent/log"),
        (["--incoming", "file:absent.img"], 1, "absent.img"),
    ],
)
def test_one_that_can_not_run_is_its_sentence_and_leaves_nothing(
    kvmmig: Kvmmig, runtime_directory: Path, arguments: list[str], status: int, sentence: str
) -> None:
    failed = kvmmig("run", *arguments, "--detach")
    assert failed.process.returncode == status
    assert failed.stdout == ""
    assert failed.stderr.startswith("kvmmig: ")
    assert sentence in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert list(runtime_directory.glob("*")) == []


def test_ctrl_c_before_it_runs_takes_it_along(kvmmig: Kvmmig, runtime_directory: Path) -> None:
    log = runtime_directory / "a.log"
    starting = kvmmig.start("run", "dirtier", "--memory", "1GiB", "--name", "a", "--detach")
    starting.wait_for(lambda it: log.exists())
    starting.interrupt()
    assert starting.end() == 130
    assert list(runtime_directory.iterdir()) == []


def test_what_a_crashed_one_said_last_is_in_its_log(
    background: Background, kvmmig: Kvmmig, runtime_directory: Path, command: Command
) -> None:
    source = (
        "; crash: dies on a key\n;@ entry long64\nmov dx, 0x3fd\nlook: in al, dx\ntest al, 1\njz look\nud2\n"
    )
    background("run", kvmmig.program("crash.asm", source), "--name", "a", "--memory", "8MiB")
    key = kvmmig.start("console", "a", stdin=-1)
    key.type(b"x")
    assert key.end() == 0
    wait_until_gone(runtime_directory / "a.lock")
    assert "the guest crashed" in (runtime_directory / "a.log").read_text()
    status, _, error = command("status", "a")
    assert status == 1
    assert "its last words: kvmmig logs a)" in error


def test_what_a_guest_wrote_that_has_ended_is_in_its_log(
    background: Background, runtime_directory: Path, command: Command
) -> None:
    """It may have ended before anybody could look at its serial port."""
    background("run", "hello", "--name", "a")
    wait_until_gone(runtime_directory / "a.lock")
    assert "Hello from a KVM guest" in (runtime_directory / "a.log").read_text()
    status, _, error = command("console", "a")
    assert status == 1
    assert "its last words: kvmmig logs a)" in error


def wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_that_takes_a_guest_in_says_where(
    background: Background, kvmmig: Kvmmig, command: Command, runtime_directory: Path
) -> None:
    background("run", "dirtier", *SMALL, "--name", "a")
    waiting = kvmmig.start("run", "--incoming", "tcp:127.0.0.1:0", "--name", "b", "--detach")
    assert waiting.process.wait(PATIENCE) == 0
    waiting.close()
    uri = re.search(r"tcp:127\.0\.0\.1:\d+", waiting.stderr)
    assert uri, waiting
    status, _, said = command("migrate", "a", uri[0])
    assert status == 0
    assert "'a' has been ended here" in said
    assert [(each["name"], each["status"]) for each in json.loads(command("ls", "--json")[1])] == [
        ("b", "running")
    ]


def test_a_killed_one_is_not_listed_and_its_name_is_free(
    background: Background, command: Command, runtime_directory: Path
) -> None:
    for _ in range(2):
        background("run", "dirtier", *SMALL, "--name", "a")
        (about,) = json.loads(command("ls", "--json")[1])
        os.kill(about["pid"], signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while rundir.answers("a"):  # a killed process takes a moment to be gone
            assert time.monotonic() < deadline
            time.sleep(0.01)
    status, listed, said = command("ls")
    assert (status, listed) == (0, "")
    assert "start one with" in said
    assert list(runtime_directory.glob("a.sock")) == []
