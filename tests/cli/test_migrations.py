from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Kvmmig, Running

pytestmark = pytest.mark.kvm

SMALL = ("--memory", "32MiB", "--set", "hot=2MiB")


def listening(kvmmig: Kvmmig) -> tuple[Running, str]:
    destination = kvmmig.start("run", "--incoming", "tcp:127.0.0.1:0")
    destination.wait_for(lambda it: "waiting for a guest" in it.stderr)
    found = re.search(r"tcp:127\.0\.0\.1:[1-9]\d*", destination.stderr)
    assert found, destination
    return destination, found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def goes_on(running: Running, letters: int = 3) -> None:
    """The guest makes further passes, in each of which it checks all that it has."""
    before = len(running.stdout)
    running.wait_for(lambda it: len(it.stdout) >= before + letters)
    assert "FAIL" not in running.stdout


def test_a_guest_moves_to_another_process_and_goes_on_there(kvmmig: Kvmmig) -> None:
    destination, uri = listening(kvmmig)
    with socket.create_connection(("127.0.0.1", int(uri.rsplit(":", 1)[1]))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: kvmmig\r\n\r\n")
        destination.wait_for(lambda it: "passed over" in it.stderr and "not a kvmmig stream" in it.stderr)
    source = kvmmig.start("run", "dirtier", *SMALL, "--migrate-to", uri, "--after", "500ms")
    assert source.end() == 0
    assert "round 0:" in source.stderr
    assert "the guest has moved to" in source.stderr
    assert "downtime" in source.stderr
    destination.wait_for(lambda it: "has arrived from 127.0.0.1:" in it.stderr)
    assert f"(user {os.geteuid()})" in destination.stderr
    goes_on(destination)
    destination.interrupt()
    assert destination.end(logs=True) == 130


def test_a_guest_that_ends_elsewhere_gives_its_status_there(kvmmig: Kvmmig) -> None:
    source = kvmmig("guests", "hello").stdout
    # Long enough that it is still at it when it moves.
    waits = source.replace("start:", "start:\n mov rcx, 2000000000\nslow: loop slow").replace(
        "xor eax, eax", "mov eax, 9"
    )
    destination, uri = listening(kvmmig)
    guest = kvmmig.program("slow.asm", waits)
    assert (
        kvmmig("run", guest, "--memory", "8MiB", "--migrate-to", uri, "--after", "0").process.returncode == 0
    )
    assert destination.end() == 9
    assert destination.stdout.startswith("Hello")


@pytest.mark.parametrize("scheme", ["file", "pipe"])
def test_a_saved_guest_comes_back(kvmmig: Kvmmig, tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}:{tmp_path}/saved.img"
    saved = kvmmig("run", "dirtier", *SMALL, "--migrate-to", uri, "--after", "0.3")
    assert saved.process.returncode == 0
    assert (tmp_path / "saved.img").stat().st_size > 30 << 20
    for _ in range(2):  # as often as one likes
        restored = kvmmig.start("run", "--incoming", uri)
        restored.wait_for(lambda it: "has arrived" in it.stderr)
        goes_on(restored)
        restored.interrupt()
        assert restored.end() == 130


def test_a_truncated_file_is_one_sentence(
    kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    kvmmig("run", "dirtier", *SMALL, "--migrate-to", f"file:{whole}", "--after", "0.1")
    for keep in (0, 8, 5_000_000, -1):
        cut.write_bytes(whole.read_bytes()[:keep])
        failed = kvmmig("run", "--incoming", f"file:{cut}")
        assert failed.process.returncode == 1
        assert failed.stdout == ""
        first, second = failed.stderr.splitlines()
        assert "waiting for a guest" in first
        assert second.startswith("kvmmig: ")
    nothing_left()


def test_a_file_of_another_kind_is_one_sentence(kvmmig: Kvmmig) -> None:
    program = Path(shutil.which("sh") or "/bin/sh").resolve()
    failed = kvmmig("run", "--incoming", f"file:{program}")
    assert failed.process.returncode == 1
    assert failed.stderr.splitlines()[1].startswith(f"kvmmig: {program}: this is not a kvmmig stream")


def test_where_nobody_listens_the_guest_goes_on_here(kvmmig: Kvmmig) -> None:
    nobody = f"tcp:127.0.0.1:{free_port()}"
    source = kvmmig.start("run", "dirtier", *SMALL, "--migrate-to", nobody, "--after", "0.1")
    source.wait_for(lambda it: "goes on running here" in it.stderr)
    assert f"kvmmig: can't connect to {nobody}" in source.stderr
    goes_on(source)
    source.interrupt()
    assert source.end() == 130


def test_a_guest_that_did_not_move_gives_status_1_whatever_its_own(kvmmig: Kvmmig) -> None:
    hello = kvmmig("run", "hello", "--migrate-to", f"tcp:127.0.0.1:{free_port()}")
    assert hello.process.returncode == 1
    assert hello.stdout.startswith("Hello")
    assert hello.stderr == "kvmmig: the guest ended before it was to move: it exited with status 0\n"


def test_a_failed_save_leaves_an_older_file_alone(kvmmig: Kvmmig, tmp_path: Path) -> None:
    older = tmp_path / "saved"
    older.write_text("precious")
    helper = tmp_path / "helper"
    helper.write_text("#!/bin/sh\necho the disk is on fire >&2\nexit 3\n")
    helper.chmod(0o755)
    uri = f"pipe:{older}?helper={helper}"
    source = kvmmig.start("run", "dirtier", *SMALL, "--migrate-to", uri, "--after", "0.1")
    source.wait_for(lambda it: "goes on running here" in it.stderr)
    assert "the disk is on fire" in source.stderr
    goes_on(source)
    source.interrupt()
    assert source.end() == 130
    assert older.read_text() == "precious"
