"""The runtime directory, where another user of the host has been first."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmmig.cli import rundir
from tests.strangers import NOBODY, as_nobody, needs_second_user

Command = Callable[..., tuple[int, str, str]]

#: Every command that looks for a machine by its name, with what else it wants.
COMMANDS = [
    ("ls",),
    ("status", "a"),
    ("console", "a"),
    ("pause", "a"),
    ("resume", "a"),
    ("reset", "a"),
    ("quit", "a"),
    ("cancel", "a"),
    ("set", "a"),
    ("migrate", "a", "tcp:127.0.0.1:9"),
    ("save", "a", "/nowhere/a.img"),
    ("run", "hello", "--name", "a"),
]


@contextmanager
def listening_stranger(directory: Path, *names: str) -> Iterator[None]:
    """Another user listens on these sockets, in a directory that is ours."""
    directory.parent.chmod(0o711)
    directory.chmod(0o777)

    def listen() -> list[socket.socket]:
        made = []
        for name in names:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(str(directory / name))
            os.chmod(directory / name, 0o666)
            sock.listen()
            made.append(sock)
        return made

    with as_nobody(listen):
        directory.chmod(0o700)
        yield


@needs_second_user
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_directory_of_another_user_is_refused_by_every_command(
    words: tuple[str, ...], runtime_directory: Path, tmp_path: Path, command: Command
) -> None:
    elsewhere = tmp_path / "kvmmig"
    elsewhere.mkdir()
    for suffix in (".sock", ".console", ".lock", ".log"):
        (elsewhere / f"a{suffix}").touch()
    runtime_directory.mkdir(mode=0o700)
    for suffix in (".sock", ".console", ".lock", ".log"):
        (runtime_directory / f"a{suffix}").symlink_to(elsewhere / f"a{suffix}")
    os.chown(runtime_directory, NOBODY, NOBODY)
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert f"can't be used: it belongs to user {NOBODY}" in err
    assert len(os.listdir(elsewhere)) == len(os.listdir(runtime_directory)) == 4


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_link_in_its_place_is_refused_by_every_command(
    words: tuple[str, ...], runtime_directory: Path, tmp_path: Path, command: Command
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "a.lock").touch()
    runtime_directory.symlink_to(elsewhere)
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert "can't be used: it is no directory" in err
    assert os.listdir(elsewhere) == ["a.lock"]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_one_that_others_can_write_to_is_refused_by_every_command(
    words: tuple[str, ...], runtime_directory: Path, command: Command
) -> None:
    runtime_directory.mkdir()
    runtime_directory.chmod(0o770)
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert "it must have mode 0700" in err
    assert os.listdir(runtime_directory) == []


def test_completion_finds_no_names_in_what_is_refused(runtime_directory: Path) -> None:
    from tests.cli.test_completion import completions

    runtime_directory.mkdir(mode=0o755)
    runtime_directory.chmod(0o755)
    (runtime_directory / "a.sock").touch()
    assert completions("status", "") == []


@needs_second_user
@pytest.mark.parametrize("words", COMMANDS[1:], ids=lambda words: words[0])
def test_nobody_talks_to_a_stranger_who_listens_in_it(
    words: tuple[str, ...], runtime_directory: Path, command: Command
) -> None:
    runtime_directory.mkdir(mode=0o700)
    with listening_stranger(runtime_directory, "a.sock", "a.console"):
        status, out, err = command(*words)
        assert (status, out) == (1, "")
        assert f"user {NOBODY} listens on a." in err


def test_links_in_it_are_not_followed(runtime_directory: Path, tmp_path: Path) -> None:
    runtime_directory.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for suffix in (".sock", ".console", ".lock", ".log"):
        (runtime_directory / f"a{suffix}").symlink_to(victim)
    with pytest.raises(rundir.RuntimeDirectoryUnusable):
        rundir.claim("a")
    assert not rundir.answers("a")
    assert not rundir.has_log("a")
    assert rundir.take_log("a") == ""
    (runtime_directory / "a.lock").unlink()
    claim = rundir.claim("a")
    os.close(claim.open_log())
    claim.release()
    assert victim.read_text() == "precious"
    assert os.listdir(runtime_directory) == []


def test_a_socket_is_reached_by_a_link_to_nowhere_else(runtime_directory: Path, tmp_path: Path) -> None:
    runtime_directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(runtime_directory / "b.sock"))
        other.listen()
        (runtime_directory / "a.sock").symlink_to("b.sock")
        assert rundir.answers("b")
        assert not rundir.answers("a")


def test_a_claim_stays_in_the_directory_that_was_checked(runtime_directory: Path, tmp_path: Path) -> None:
    claim = rundir.claim("a")
    moved = runtime_directory.rename(tmp_path / "moved")
    runtime_directory.mkdir(mode=0o755)
    (runtime_directory / "a.lock").touch()
    os.close(claim.open_log())
    assert sorted(os.listdir(moved)) == ["a.lock", "a.log"]
    claim.release()
    assert os.listdir(moved) == []
    assert os.listdir(runtime_directory) == ["a.lock"]


def test_a_new_log_is_a_new_file(runtime_directory: Path, tmp_path: Path) -> None:
    claim = rundir.claim("a")
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", claim.files.log)
    log = claim.open_log()
    assert stat.S_IMODE(os.fstat(log).st_mode) == 0o600
    os.close(log)
    claim.release()
    assert (tmp_path / "victim").read_text() == "precious"


def test_one_of_ones_own_is_talked_to(runtime_directory: Path, command: Command) -> None:
    runtime_directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as fake:
        fake.bind(str(runtime_directory / "a.sock"))
        fake.listen()

        def babble() -> None:
            with fake.accept()[0] as client:
                client.sendall(b"no greeting\n")

        threading.Thread(target=babble).start()
        assert command("status", "a") == (
            1,
            "",
            f"kvmmig: the monitor at unix:{runtime_directory}/a.sock does not speak QMP\n",
        )
