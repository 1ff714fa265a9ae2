"""The names of machines, and their files in the runtime directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvmmig.cli import rundir
from kvmmig.errors import BadConfig

from .conftest import Kvmmig

SMALL = ("--memory", "32MiB", "--set", "hot=2MiB")


def leave_socket(path: Path) -> None:
    """As somebody does who was killed: a socket that nobody answers."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_a_name_belongs_to_one_until_it_is_released(runtime_directory: Path) -> None:
    held = rundir.claim("a")
    with pytest.raises(rundir.NameTaken, match="kvmmig quit a"):
        rundir.claim("a")
    other = rundir.claim_like("a")
    assert other.name == "a-2"
    held.release()
    held.release()
    again = rundir.claim("a")
    assert rundir.claim_like("a").name == "a-3"
    again.release()
    other.release()


def test_what_a_killed_machine_has_left_is_taken_over(runtime_directory: Path) -> None:
    rundir.claim("a").release()
    for path in (rundir.files_of("a").monitor, rundir.files_of("a").console):
        leave_socket(path)
    assert rundir.names() == ["a"]
    claim = rundir.claim("a")
    assert not claim.files.monitor.exists()
    claim.release()
    assert list(runtime_directory.iterdir()) == []


def test_cleaning_leaves_the_living_and_every_log(runtime_directory: Path) -> None:
    living = rundir.claim("living")
    leave_socket(rundir.files_of("dead").monitor)
    rundir.files_of("dead").lock.touch()
    rundir.files_of("dead").log.write_text("its last words")
    with socket.socket(socket.AF_UNIX) as foreign:  # somebody's own monitor, without a lock
        foreign.bind(str(rundir.files_of("foreign").monitor))
        foreign.listen()
        rundir.clean()
        assert rundir.names() == ["foreign"]
        with pytest.raises(rundir.NameTaken):
            rundir.claim("foreign")
    assert sorted(path.name for path in runtime_directory.iterdir() if "foreign" not in path.name) == [
        "dead.log",
        "living.lock",
    ]
    living.release()


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "-x", "ä", "a b", "x" * 49])
def test_what_is_no_name_is_said_so(name: str) -> None:
    with pytest.raises(BadConfig, match="can't be a machine's name"):
        rundir.claim(name)


def test_any_guests_name_makes_a_machines_name(runtime_directory: Path) -> None:
    for name, expected in (("my guest.img", "my-guest.img"), ("...", "machine"), ("x" * 99, "x" * 40)):
        claim = rundir.claim_like(name)
        assert claim.name == expected
        claim.release()


def test_only_a_directory_of_ones_own_is_used(runtime_directory: Path) -> None:
    runtime_directory.mkdir(mode=0o755)
    runtime_directory.chmod(0o755)
    with pytest.raises(rundir.RuntimeDirectoryUnusable, match="0700"):
        rundir.claim("a")
    runtime_directory.rmdir()
    runtime_directory.symlink_to("/tmp")
    with pytest.raises(rundir.RuntimeDirectoryUnusable, match="no directory"):
        rundir.claim("a")


def test_without_an_environment_there_is_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    user = os.getuid()
    assert str(rundir.directory()) in (f"/run/user/{user}/kvmmig", f"/tmp/kvmmig-{user}")


@pytest.mark.kvm
def test_a_machine_runs_where_it_can_not_be_reached_unless_that_was_asked_for(
    kvmmig: Kvmmig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = tmp_path / ("x" * 100)
    too_long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(too_long))
    ran = kvmmig("run", "hello")
    assert ran.process.returncode == 0
    assert "no other command can reach this machine" in ran.stderr
    assert ran.stdout.startswith("Hello")
    for wish in (["--name", "a"], ["--detach"]):
        refused = kvmmig("run", "hello", *wish)
        assert refused.process.returncode == 1
        assert refused.stdout == ""
        assert refused.stderr.startswith("kvmmig: the runtime directory")
        assert "107" in refused.stderr


@pytest.mark.kvm
def test_names_are_made_unique_and_given_back(kvmmig: Kvmmig, runtime_directory: Path) -> None:
    machines = [kvmmig.start("run", "dirtier", *SMALL) for _ in range(2)]
    for machine in machines:
        machine.wait_for(lambda it: "A" in it.stdout)
    assert rundir.names() == ["dirtier", "dirtier-2"]
    assert {path.stat().st_mode & 0o777 for path in runtime_directory.iterdir()} == {0o600}
    taken = kvmmig("run", "hello", "--name", "dirtier")
    assert taken.process.returncode == 1
    assert "'dirtier' runs already" in taken.stderr
    for machine in machines:
        machine.interrupt()
        machine.end()
    assert list(runtime_directory.iterdir()) == []
