"""The words that users of docker, virsh and QEMU type, several names at once, and JSON for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from kvmmig.cli import demo_table
from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.demo_table import Case, Row
from kvmmig.transport import TransportURI

from .conftest import PATIENCE

Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]
HELLO = "Hello"
SMALL = ("dirtier", "-m", "16MiB", "--set", "hot=1MiB")


@pytest.mark.kvm
def test_a_machine_lives_by_dockers_words(background: Background, command: Command) -> None:
    background("run", *SMALL, "--name", "a", "--paused")
    background("run", *SMALL, "--name", "b")
    assert command("ps")[1].split()[7] == "a"
    states = {each["name"]: each["status"] for each in json.loads(command("ps", "--json")[1])}
    assert states == {"a": "prelaunch", "b": "running"}
    status, out, error = command("resume", "a", "nobody", "b")
    assert (status, out) == (1, "")
    assert error.startswith("kvmmig: there is no machine 'nobody'")
    assert "running" in command("status", "a", "b")[1]
    assert command("logs", "b")[0] == 0
    assert command("stop", "a", "b") == (0, "", "")
    assert json.loads(command("ps", "--json")[1]) == []


@pytest.mark.kvm
def test_logs_have_what_a_guest_has_written_while_it_runs_and_when_it_has_ended(
    background: Background, command: Command
) -> None:
    name = background("run", "echo")
    deadline = time.monotonic() + PATIENCE
    while "Type, and I type it back" not in command("logs", name)[1]:
        assert time.monotonic() < deadline
    assert command("stop", name)[0] == 0
    ended = background("run", "hello")
    status, out, _ = command(
        "logs", ended, "-f"
    )  # it may end before this, meanwhile, or not yet have said it
    assert (status, out.count(HELLO)) == (0, 1)
    assert command("logs", ended)[1].count(HELLO) == 1
    assert command("logs", "nobody")[0] == 1


@pytest.mark.kvm
def test_what_comes_paused_stays_so(background: Background, command: Command, tmp_path: object) -> None:
    background("run", *SMALL, "--name", "a")
    saved = f"{tmp_path}/a.img"
    assert command("save", "a", saved, "--bandwidth", "none", "--downtime", "1s", "--timeout", "2min")[0] == 0
    background("restore", saved, "--name", "b", "--paused")
    assert json.loads(command("status", "b", "--json")[1])["status"] in ("paused", "prelaunch")
    assert command("resume", "b")[0] == 0
    assert json.loads(command("status", "b", "--json")[1])["status"] == "running"


@pytest.mark.parametrize("what", ["guests", "transports", "version", "ps"])
def test_what_is_shown_is_there_for_programs_too(command: Command, what: str) -> None:
    status, out, _ = command(what, "--json")
    assert status == 0
    json.loads(out)


COLUMNS = (Column("NAME"), Column("LESS", importance=2), Column("LEAST", importance=3), Column("VERDICT"))
ROWS = [("pipe + helper", "12345678", "1234567890", "verified")]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, ["NAME", "LESS", "LEAST", "VERDICT"]),
        (36, ["NAME", "LESS", "VERDICT"]),
        (24, ["NAME", "VERDICT"]),
        (15, ["NAME", "VERDICT"]),
    ],
)
def test_a_narrow_terminal_loses_what_matters_least(
    width: int, shown: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Console(width=width)
    out.print(fitted(COLUMNS, ROWS, out))
    head, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == shown
    letters = "".join("".join(rest).split())
    assert len(letters) == sum(
        len(cell.replace(" ", ""))
        for cell, column in zip(ROWS[0], COLUMNS, strict=True)
        if column.title in shown
    )


@pytest.mark.parametrize("width", [24, 40, 80, 120])
def test_the_demos_table_has_its_verdicts_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(demo_table, "_PLAIN_WIDTH", width)
    rows = [
        Row(Case("pipe + helper", "", TransportURI("file", "x"))),
        Row(Case("tcp", "", TransportURI("tcp", "x:1"))),
    ]
    rows[1].verdict = "FAILED: a page is lost"
    demo_table.print_table(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= max(width, len("tcp: FAILED: a page is lost"))
    assert "verified" in out
    assert "tcp: FAILED: a page is lost" in out
