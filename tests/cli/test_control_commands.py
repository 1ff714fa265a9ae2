"""The commands that reach a machine by its name, each as a person uses it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.cli import rundir
from kvmmig.qmp.client import QMPClient

from .conftest import PATIENCE, Kvmmig
from .test_operator import vanish_after_go

pytestmark = pytest.mark.kvm

SMALL = ("dirtier", "--memory", "16MiB", "--set", "hot=1MiB", "--name", "a")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]


def state(command: Command, name: str) -> str:
    told: str = json.loads(command("status", name, "--json")[1])["status"]
    return told


def slow(tmp_path: Path) -> str:
    """A way that takes a while, however fast the machine."""
    return f"throttle+file:{tmp_path}/slow.img?throttle.rate=1MB/s"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_machine_is_paused_resumed_reset_and_tuned(background: Background, command: Command) -> None:
    background("run", *SMALL)
    about = json.loads(command("status", "a", "--json")[1])
    assert (about["guest"], about["cpus"], about["migration"]) == ("dirtier", 1, {})
    assert command("pause", "a") == (0, "", "")
    assert state(command, "a") == "paused"
    assert command("resume", "a") == (0, "", "")
    assert command("reset", "a") == (0, "", "")
    assert state(command, "a") == "running"

    assert (
        command("set", "a", "downtime-limit", "50ms", "bandwidth", "500MB/s", "auto-converge", "on")[0] == 0
    )
    shown = command("set", "a")[1]
    for line in (
        r"downtime-limit +50ms",
        r"bandwidth +500MB/s",
        r"auto-converge +on",
        r"page-digests +off",
        r"policy +combined",
    ):
        assert re.search(line, shown), shown
    assert command("set", "a", "page-digests", "on")[0] == 0
    assert re.search(r"page-digests +on", command("set", "a")[1])
    assert command("set", "a", "max-bandwidth", "none", "policy", "max-rounds")[0] == 0
    shown = command("set", "a")[1]
    assert re.search(r"bandwidth +none", shown)
    assert re.search(r"policy +max-rounds", shown)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["set", "a", "speed", "1"], 2, "there are downtime-limit, bandwidth"),
        (["set", "a", "bandwidth", "fast"], 2, "write it like 500MB/s"),
        (["set", "a", "downtime-limit", "soon"], 2, "write it like 2s"),
        (["set", "a", "auto-converge", "maybe"], 2, "on or off"),
        (["set", "a", "bandwidth"], 2, "has no value"),
        (["migrate", "a", "tcp:x:1", "--keep", "--detach"], 2, "--keep"),
        (["migrate", "a", "tcp://x:1"], 2, "write tcp:x:1"),
        (["migrate", "a", "tcp:x:1", "--bandwidth", "100"], 2, "write 100B/s or 100MB/s"),
        (["run", "nobody"], 2, "there is no guest"),
        (["run", "hello", "-m", "1gb"], 2, "did you mean 1GiB?"),
        (["run", "hello", "-m", "1GB"], 2, "did you mean 1GiB?"),
        (["run", "hello", "--set", "hot=1"], 2, "has no parameter"),
        (["run", "hello", "--qmp", "here"], 2, "write unix:PATH"),
        (["run", "hello", "--paused", "--migrate-to", "tcp:x:1"], 2, "--paused"),
        (["restore", "x", "--transport", "pigeon"], 2, "no transport is called"),
        (["guests", "nobody"], 2, "there is no guest"),
        (["demo", "--directory", "/nowhere"], 2, "there is no such directory"),
        (["logs", "a", "b", "-f"], 2, "choose one of a, b"),
        (["status", "a", "b", "--watch"], 2, "choose one of a, b"),
        (["status", "../a"], 2, "can't be a machine's name"),
        *(
            ([name, "a", *more], 1, "there is no machine 'a'; none runs; start one with: kvmmig run")
            for name, *more in (
                *(("status",), ("pause",), ("resume",), ("reset",), ("quit",), ("console",), ("cancel",)),
                *(("set",), ("migrate", "tcp:x:1"), ("save", "x.img")),
            )
        ),
    ],
)
def test_bad_input_is_one_sentence(
    command: Command, arguments: list[str], status: int, sentence: str
) -> None:
    assert (told := command(*arguments))[0] == status
    assert sentence in told[2].splitlines()[-1]
    assert told[1] == ""


def test_an_error_names_the_machines_that_run(background: Background, command: Command) -> None:
    background("run", *SMALL)
    assert command("status", "b")[2] == "kvmmig: there is no machine 'b'; these run: a\n"
    assert "nothing to cancel" in command("cancel", "a")[2]
    assert "nothing to take back" in command("resume", "a", "--force")[2]
    status, out, error = command("migrate", "a", "pigeon:home")
    assert (status, out) == (2, "")
    assert "pigeon" in error


def test_a_guest_is_saved_and_restored_as_often_as_one_likes(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    path = str(tmp_path / "saved guest.img")
    status, out, said = command("save", "a", path)
    assert status == 0, said
    for text in ("round 0:", "done", "downtime", "worst stall"):
        assert text in out
    assert "\x1b" not in out
    assert f"kvmmig restore {shlex.quote(path)}" in said
    assert rundir.names() == []
    assert background("restore", path) == "saved-guest"
    assert background("restore", path, "--transport", "pipe", "--name", "b") == "b"
    assert rundir.names() == ["b", "saved-guest"]


@pytest.mark.parametrize("name", ["guest?direct=off", "100%25 of it", "a+b & c=d", "ünï code"])
def test_a_file_has_the_very_name_that_it_was_given(
    background: Background, command: Command, tmp_path: Path, name: str
) -> None:
    background("run", *SMALL)
    assert command("save", "a", str(tmp_path / name))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    background("restore", str(tmp_path / name), "--name", "b")


def test_a_name_that_no_monitor_can_be_told_is_a_sentence(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    status, out, error = command("save", "a", str(tmp_path) + "/not-\udcff-text")
    assert (status, out) == (2, "")
    assert "that is no UTF-8" in error
    assert state(command, "a") == "running"


def test_programs_get_json_and_keep_the_machine(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    status, out, said = command("save", "a", str(tmp_path / "a.img"), "--keep", "--json")
    assert status == 0
    figures = [json.loads(line) for line in out.splitlines()]
    assert figures[-1]["phase"] == "done"
    assert figures[-1]["downtime"] > 0
    assert figures[-1]["rounds"]
    assert "kvmmig quit a" in said
    assert state(command, "a") == "postmigrate"
    assert "has moved away" in command("migrate", "a", "tcp:127.0.0.1:1")[2]
    assert "to " in command("status", "a")[1]


def test_a_failed_one_is_a_sentence_and_the_guest_goes_on(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    status, _, said = command("save", "a", str(tmp_path / "nowhere" / "a.img"))
    assert (status, said.endswith("nowhere/a.img': No such file or directory\n")) == (1, True), said
    assert "nowhere" not in command("status", "a")[1], "that was none"
    status, _, said = command("migrate", "a", f"unix:{tmp_path}/absent")
    assert status == 1
    assert "absent" in said.splitlines()[0]
    assert said.endswith("the guest of 'a' is here as before: running\n")
    assert "absent" in command("status", "a")[1]


def test_one_is_watched_tuned_and_cancelled_from_elsewhere(
    background: Background, kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    moving = kvmmig.start("migrate", "a", slow(tmp_path))
    moving.wait_for(lambda it: "sending memory" in it.stdout)
    assert state(command, "a") == "running"
    status, _, error = command("migrate", "a", "tcp:127.0.0.1:1")
    assert status == 1
    assert error.endswith("to watch it: kvmmig status a --watch; to end it: kvmmig cancel a\n")
    status, _, error = command("migrate", "a", "tpc:127.0.0.1:1")
    assert (status, "did you mean 'tcp'" in error) == (2, True)
    shown = command("status", "a")[1]
    assert "round 0, the guest runs" in shown
    assert "time left" in shown
    assert command("set", "a", "throttle.rate", "2MB/s")[0] == 0
    assert re.search(r"throttle.rate +2 MB/s", command("set", "a")[1])
    assert command("cancel", "a") == (0, "", "")
    assert moving.end() == 1
    assert "cancelled" in moving.stderr
    assert state(command, "a") == "running"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels_where_nobody_can_be_asked(
    background: Background, kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    moving = kvmmig.start("migrate", "a", slow(tmp_path))
    moving.wait_for(lambda it: "sending memory" in it.stdout)
    moving.interrupt()
    assert moving.end() == 130
    assert state(command, "a") == "running"
    assert list(tmp_path.iterdir()) == []


def test_a_detached_one_goes_on_alone_and_ends_with_its_machine(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    status, out, said = command("migrate", "a", slow(tmp_path), "--detach")
    assert (status, out) == (0, "")
    assert "kvmmig status a --watch" in said
    assert command("quit", "a")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_machine_ends_the_commands_that_look_at_it(
    background: Background, kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    watching = kvmmig.start("status", "a", "--watch")
    watching.wait_for(lambda it: "a: running" in it.stdout)
    moving = kvmmig.start("migrate", "a", slow(tmp_path), "--json")
    moving.wait_for(lambda it: '"rounds"' in it.stdout)
    assert command("quit", "a")[0] == 0
    assert watching.end() == 0
    assert moving.end() == 1
    assert "the machine 'a' has ended" in moving.stderr


def test_a_machine_whose_guest_was_moved_by_a_command_says_so_and_stays(
    kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    machine = kvmmig.start("run", *SMALL)
    machine.wait_for(lambda it: "A" in it.stdout)
    assert command("save", "a", str(tmp_path / "a.img"), "--keep")[0] == 0
    machine.wait_for(lambda it: "kvmmig quit a" in it.stderr)
    assert command("quit", "a")[0] == 0
    assert machine.end() == 0


def test_after_an_unknown_outcome_the_operator_decides(background: Background, command: Command) -> None:
    background("run", *SMALL)
    with socket.create_server(("127.0.0.1", 0)) as server:
        other_side = threading.Thread(target=vanish_after_go, args=(server,))
        other_side.start()
        status, _, said = command("migrate", "a", f"tcp:127.0.0.1:{server.getsockname()[1]}")
        other_side.join()
    assert status == 1
    assert "kvmmig resume a --force" in said
    assert command("resume", "a")[0] == 1
    assert command("resume", "a", "--force")[0] == 0
    assert state(command, "a") == "running"
    assert "goes on running here" in rundir.files_of("a").log.read_text()


async def test_a_deferred_machine_waits_for_a_monitors_word(
    kvmmig: Kvmmig, background: Background, tmp_path: Path, runtime_directory: Path
) -> None:
    monitor = f"unix:{runtime_directory.parent}/own.sock"
    waiting = kvmmig.start("run", "--incoming", "defer", "--name", "b", "--qmp", monitor)
    waiting.wait_for(lambda it: f"its monitor listens on {monitor}" in it.stderr)
    background("run", *SMALL)
    kvmmig("save", "a", str(tmp_path / "a.img"))
    with trio.fail_after(PATIENCE):
        async with QMPClient.connect(monitor) as client:
            assert (await client.execute("query-status"))["status"] == "inmigrate"
            await client.execute("migrate-incoming", {"uri": f"file:{tmp_path}/a.img"})
        await trio.to_thread.run_sync(lambda: waiting.wait_for(lambda it: "has arrived" in it.stderr))
    waiting.interrupt()
    assert waiting.end() == 130


def test_a_stopped_process_does_not_hold_up_the_list(kvmmig: Kvmmig, command: Command) -> None:
    machine = kvmmig.start("run", *SMALL)
    machine.wait_for(lambda it: "A" in it.stdout)
    machine.process.send_signal(signal.SIGSTOP)
    status, out, _ = command("ls")
    machine.process.send_signal(signal.SIGCONT)
    assert status == 0
    assert "does not answer" in out
    machine.interrupt()
    machine.end()


def test_ctrl_c_leaves_a_machine_that_is_stuck(kvmmig: Kvmmig, command: Command, tmp_path: Path) -> None:
    machine = kvmmig.start("run", *SMALL)
    machine.wait_for(lambda it: "A" in it.stdout)
    moving = kvmmig.start("migrate", "a", slow(tmp_path))
    moving.wait_for(lambda it: "sending memory" in it.stdout)
    machine.process.send_signal(signal.SIGSTOP)
    moving.interrupt()
    while moving.process.poll() is None:
        moving.interrupt()
        time.sleep(0.1)
    assert moving.end() == 3
    machine.process.send_signal(signal.SIGCONT)
    machine.interrupt()
    machine.end()


def test_a_reader_who_goes_away_ends_the_command_and_not_the_migration(
    background: Background, kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    source, sink = os.pipe()
    moving = kvmmig.start("migrate", "a", slow(tmp_path), "--json", stdout=sink)
    os.close(sink)
    assert os.read(source, 10)
    os.close(source)
    assert moving.end() == 1
    assert moving.stderr == ""
    assert json.loads(command("status", "a", "--json")[1])["migration"]["phase"] in ("setup", "rounds")


async def test_clients_are_told_that_a_signal_ends_the_machine(
    background: Background, command: Command, runtime_directory: Path
) -> None:
    await trio.to_thread.run_sync(background, "run", *SMALL)
    with trio.fail_after(PATIENCE):
        async with QMPClient.connect(f"unix:{runtime_directory}/a.sock") as client:
            os.kill((await client.execute("x-kvmmig-query-machine"))["pid"], signal.SIGTERM)
            async for event in client.events():
                if event.name == "SHUTDOWN":
                    assert event.data == {"guest": False, "reason": "host-signal"}
                    break
