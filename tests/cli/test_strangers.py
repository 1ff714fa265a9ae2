"""Transports that a package brings: as good as built-in ones, and a machine survives those that are not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.cli import rundir

from .conftest import PATIENCE, Kvmmig
from .test_completion import completions

SMALL = ("dirtier", "--memory", "16MiB", "--set", "hot=1MiB")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]

ENTRIES = """\
[kvmmig.transports]
keep = a_stranger:Keep
deaf = a_stranger:ToDeaf
holding = a_stranger:ToHolding
buggy = a_stranger:ToBuggy
failing = a_stranger:ToFailing
rude = a_stranger:FromRude
clinging = a_stranger:FromClinging
broken = a_stranger.that_is_not_there:Nothing
"""
#: A logged line: when, how bad, who says so, what.
LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ERROR kvmmig\.transport: (.*)$", re.MULTILINE)
#: `kvmmig`, but it has less patience with what does not end.
IMPATIENT = """\
import sys
from kvmmig.cli import forced_exit, main
forced_exit.BOUND = 0.5
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with transports is installed, for this process and for those that it starts."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(Path(__file__).parent / "stranger.py", site / "a_stranger.py")
    metadata = site / "stranger-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))


@pytest.fixture
def impatient(tmp_path: Path) -> Path:
    path = tmp_path / "impatient.py"
    path.write_text(IMPATIENT)
    return path


@pytest.mark.kvm
def test_one_that_stores_saves_and_restores_as_a_built_in_does(
    background: Background, kvmmig: Kvmmig, command: Command, tmp_path: Path
) -> None:
    name, path = background("run", *SMALL), str(tmp_path / "a.kept")
    status, _, said = command("save", name, path, "--transport", "keep")
    assert status == 0, said
    assert f"restore {path} --transport keep" in said
    assert background("restore", path, "--transport", "keep") == "a"
    incoming = kvmmig.start("run", "--incoming", f"keep:{path}", "--name", "b", "--detach")
    assert incoming.process.wait(PATIENCE) == 0
    incoming.close()
    assert "'b' runs in the background" in incoming.stderr  # it does not wait for a source
    assert {each["name"]: each["status"] for each in json.loads(command("ls", "--json")[1])} == {
        "a": "running",
        "b": "running",
    }


def test_those_that_store_are_known_to_help_and_completion(command: Command) -> None:
    assert completions("save", "a", "x", "--transport", "") == ["clinging", "file", "keep", "pipe", "rude"]
    assert completions("restore", "x", "--transport", "k") == ["keep"]
    status, out, error = command("save", "--help")
    assert (status, error) == (0, "")
    assert "clinging, file, keep, pipe, rude" in " ".join(out.split())


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        (
            "deaf",
            "--transport deaf: it stores nothing, so no guest can be saved by it; these do: clinging, file",
        ),
        ("pigeon", "no transport is called 'pigeon'"),
        ("broken", "the transport 'broken'"),
        ("keep+", "is no name for a transport"),
    ],
)
@pytest.mark.parametrize("arguments", [("save", "a"), ("restore",)])
def test_any_other_one_is_a_sentence(
    command: Command, arguments: tuple[str, ...], scheme: str, sentence: str
) -> None:
    status, out, error = command(*arguments, "x.img", "--transport", scheme)
    assert (status, out) == (1 if scheme == "broken" else 2, "")
    assert error.startswith("kvmmig: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.kvm
def test_what_its_channel_counts_is_shown(
    background: Background, command: Command, kvmmig: Kvmmig, tmp_path: Path
) -> None:
    name = background("run", *SMALL)
    status, out, _ = command("save", name, str(tmp_path / "a.kept"), "--transport", "keep", "--keep")
    assert status == 0
    assert re.search(r"keep\.stored-bytes +\d+\.\d MiB", out)
    assert re.search(r"keep\.files +1\n", out)
    assert re.search(r"keep\.stored-bytes +\d+\.\d MiB", command("status", name)[1])
    counters = json.loads(command("status", name, "--json")[1])["migration"]["counters"]
    assert counters == {"keep.stored-bytes": (tmp_path / "a.kept").stat().st_size, "keep.files": 1}


@pytest.mark.kvm
def test_its_bug_is_a_sentence_and_a_log_record_and_the_guest_goes_on(kvmmig: Kvmmig) -> None:
    source = kvmmig.start("run", *SMALL, "--migrate-to", "buggy:", "--after", "0.1")
    source.wait_for(lambda it: "goes on running here" in it.stderr)
    before = len(source.stdout)
    source.wait_for(lambda it: len(it.stdout) > before + 3)
    source.interrupt()
    assert source.end(logs=True) == 130
    (what,) = LOGGED.findall(source.stderr)
    assert what == "the transport 'buggy' (from stranger 0.1) failed in send_some"
    assert "ZeroDivisionError: a slip" in source.stderr
    assert "kvmmig: the transport 'buggy' (from stranger 0.1) raised ZeroDivisionError" in source.stderr


@pytest.mark.kvm
def test_its_traceback_is_in_the_log_of_the_machine_alone(background: Background, command: Command) -> None:
    name = background("run", *SMALL)
    status, out, error = command("migrate", name, "buggy:")
    assert status == 1
    assert "ZeroDivisionError: a slip" in error
    assert "Traceback" not in out + error
    log = rundir.files_of(name).log.read_text()
    assert LOGGED.search(log)
    assert "Traceback" in log


@pytest.mark.kvm
@pytest.mark.parametrize("scheme", ["rude", "clinging"])
def test_a_guest_that_has_arrived_lives_on_whatever_its_channel_does(
    kvmmig: Kvmmig, impatient: Path, tmp_path: Path, scheme: str
) -> None:
    saved = f"{tmp_path}/a.kept"
    assert kvmmig("run", *SMALL, "--migrate-to", f"keep:{saved}", "--after", "0.1").process.returncode == 0
    arrived = kvmmig.start("run", "--incoming", f"{scheme}:{saved}", wrapper=impatient)
    arrived.wait_for(lambda it: "has arrived" in it.stderr)
    before = len(arrived.stdout)
    arrived.wait_for(lambda it: len(it.stdout) > before + 3)
    arrived.interrupt()
    assert arrived.end(logs=True) == 130


@pytest.mark.kvm
def test_a_guest_that_was_handed_to_one_that_fails_can_be_taken_back(
    background: Background, command: Command
) -> None:
    name = background("run", *SMALL)
    status, _, error = command("migrate", name, "failing:")
    assert status == 1
    assert f"kvmmig resume {name} --force" in error
    assert json.loads(command("status", name, "--json")[1])["migration"]["phase"] == "unknown"
    assert command("resume", name, "--force")[0] == 0
    assert json.loads(command("status", name, "--json")[1])["status"] == "running"


@pytest.mark.kvm
@pytest.mark.parametrize("scheme", ["deaf", "holding"])
def test_one_that_does_not_end_does_not_keep_the_process(
    kvmmig: Kvmmig, impatient: Path, runtime_directory: Path, tmp_path: Path, scheme: str
) -> None:
    called = tmp_path / "called"
    migrate = ("--migrate-to", f"{scheme}:{called}", "--after", "0")
    source = kvmmig.start("run", *SMALL, "--name", "a", *migrate, wrapper=impatient)
    source.wait_for(lambda _: called.exists())
    source.interrupt()
    assert source.end(logs=True) == 130
    assert "such as what a transport has left running; after 0.5 s" in source.stderr
    assert list(runtime_directory.iterdir()) == []


@pytest.mark.kvm
def test_a_machine_that_was_told_to_quit_ends_although_something_does_not(
    kvmmig: Kvmmig, command: Command, impatient: Path, runtime_directory: Path, tmp_path: Path
) -> None:
    called = tmp_path / "called"
    machine = kvmmig.start("run", *SMALL, "--name", "a", wrapper=impatient)
    machine.wait_for(lambda it: "A" in it.stdout)
    assert command("migrate", "a", f"deaf:{called}", "--detach")[0] == 0
    machine.wait_for(lambda _: called.exists())
    assert command("quit", "a")[0] == 0
    assert machine.end(logs=True) == 0
    assert "such as what a transport has left running" in machine.stderr
    assert list(runtime_directory.iterdir()) == []
