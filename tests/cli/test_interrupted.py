"""Ctrl-C, SIGTERM and SIGHUP at any moment: a quick end, the right status, and nothing left."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Kvmmig

pytestmark = pytest.mark.kvm

SMALL = ("--memory", "32MiB", "--set", "hot=2MiB", "--after", "0.1")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_running_guest(
    kvmmig: Kvmmig, nothing_left: Callable[[], None], number: int, status: int
) -> None:
    running = kvmmig.start("run", "dirtier", *SMALL[:4])
    running.wait_for(lambda it: "A" in it.stdout)
    running.interrupt(number)
    assert running.end() == status
    assert running.stderr == ""
    nothing_left()


def test_during_a_wait_for_a_guest(kvmmig: Kvmmig) -> None:
    waiting = kvmmig.start("run", "--incoming", "tcp:127.0.0.1:0")
    waiting.wait_for(lambda it: "waiting" in it.stderr)
    waiting.interrupt()
    assert waiting.end() == 130


@pytest.mark.parametrize("signals", [1, 2, 3])
def test_while_memory_is_made(kvmmig: Kvmmig, signals: int) -> None:
    running = kvmmig.start("run", "dirtier", "--memory", "512MiB")
    running.wait_for(lambda it: _has_mapped(it.pid, 512 << 20))
    assert running.stdout == ""
    for _ in range(signals):
        running.interrupt()
    assert running.end() == 130


def _has_mapped(pid: int, size: int) -> bool:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if last - first >= size:
            return True
    return False


def test_while_python_is_still_importing(kvmmig: Kvmmig) -> None:
    running = kvmmig.start("run", "dirtier", "--memory", "64MiB")
    running.wait_for(lambda it: "numpy" in Path(f"/proc/{it.pid}/maps").read_text())
    running.interrupt()
    assert running.end() == 130
    assert running.stdout == ""


def test_during_a_save_through_a_helper_that_hangs(
    kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    helper = tmp_path / "helper"
    helper.write_text("#!/bin/sh\nwhile :; do sleep 1; done  # and never reads\n")
    helper.chmod(0o755)
    uri = f"pipe:{tmp_path}/saved.img?helper={helper}"
    saving = kvmmig.start("run", "dirtier", *SMALL, "--migrate-to", uri)
    saving.wait_for(lambda it: "sending memory" in it.stderr)
    saving.interrupt()
    assert saving.end() == 130
    nothing_left()


def test_during_a_save_to_a_file(kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    uri = f"file:{tmp_path}/saved.img"
    saving = kvmmig.start(
        "run", "dirtier", "--memory", "1GiB", "--set", "hot=2MiB", "--after", "0.1", "--migrate-to", uri
    )
    saving.wait_for(lambda it: "sending memory" in it.stderr)
    saving.interrupt()
    assert saving.end() == 130
    nothing_left()


def test_during_a_move_to_somebody_who_never_answers(kvmmig: Kvmmig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
        moving = kvmmig.start("run", "dirtier", *SMALL, "--migrate-to", uri)
        moving.wait_for(lambda it: "connecting" in it.stderr)
        accepted, _ = silent.accept()
        with accepted:
            assert accepted.recv(6)
            moving.interrupt()
            assert moving.end() == 130


def test_while_a_guest_arrives(kvmmig: Kvmmig) -> None:
    destination = kvmmig.start("run", "--incoming", "tcp:127.0.0.1:0")
    destination.wait_for(lambda it: "waiting" in it.stderr)
    port = int(destination.stderr.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)):
        destination.interrupt()
        assert destination.end() == 130


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(kvmmig: Kvmmig, tmp_path: Path) -> None:
    wrapper = tmp_path / "nohup.py"
    wrapper.write_text(
        "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from kvmmig.cli import main\nsys.exit(main())\n"
    )
    running = kvmmig.start("run", "dirtier", *SMALL[:4], wrapper=wrapper)
    running.wait_for(lambda it: "A" in it.stdout)
    running.interrupt(signal.SIGHUP)
    before = len(running.stdout)
    running.wait_for(lambda it: len(it.stdout) > before + 2)
    running.interrupt(signal.SIGTERM)
    assert running.end() == 143


def test_during_the_demo(kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    demo = kvmmig.start("demo", "--memory", "128MiB", "--directory", str(tmp_path))
    demo.wait_for(lambda it: "sending memory" in it.stdout)
    demo.interrupt()
    assert demo.end() == 130
    nothing_left()
    assert not list(tmp_path.glob("kvmmig-demo-*"))
