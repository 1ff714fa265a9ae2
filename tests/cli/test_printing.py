"""Words from outside reach a terminal with nothing in them that it would obey."""

from __future__ import annotations

import ast
import io
import json
import os
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import kvmmig.cli
from kvmmig.cli.output import Output
from kvmmig.cli.printing import console, echo, echo_json, words
from kvmmig.errors import ChannelBroken, printable

EVIL = "a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\x7fg\x00h\ud800"
SHOWN = r"a\x1b[2Jb\x9b31mc\rd\x07e\u202ef\x7fg\x00h\ud800"


@given(st.text())
def test_what_is_printable_is_one_line_of_printable_letters_and_stays_so(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert not text.isprintable() or shown == text


def test_an_error_is_one_line_whatever_the_other_side_has_said() -> None:
    assert str(ChannelBroken(EVIL)) == SHOWN
    assert str(ChannelBroken("no\nkvmmig: the guest has moved")) == r"no\nkvmmig: the guest has moved"


def test_lines_tables_and_json_are_printed_without_what_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo(EVIL)
    console(width=100).print(words(EVIL))
    assert capsys.readouterr().out.splitlines() == [SHOWN, SHOWN]
    echo_json({"name": EVIL[:-1], "more": "\U000e0041é"})
    out = capsys.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert json.loads(out) == {"name": EVIL[:-1], "more": "\U000e0041é"}


async def test_messages_and_the_status_of_a_running_command_are_printable() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
        with trio.fail_after(20):
            async with Output(serial=writer.fileno(), messages=writer.fileno()) as output:
                output.say(f"first\n{EVIL}")
                output.serial(b"the guest's own: \x1b[31mred")
        writer.close()
        said = reader.read()
    assert said == f"first\n{SHOWN}\n".encode() + b"the guest's own: \x1b[31mred"


@pytest.mark.parametrize("columns", ["²", "0", "-1", "9" * 30, "wide"])
def test_an_environment_that_makes_no_sense_is_passed_over(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert 1 <= console().width <= 10_000


def test_no_command_prints_in_any_other_way() -> None:
    """Text of our own may be styled; what is made of anything else goes through `words` or `echo`."""
    wrong = []
    folder = Path(kvmmig.cli.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "printing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            own = all(isinstance(part, ast.Constant) for part in node.args)
            makes = name in ("Text", "Console", "click.echo", "click.secho", "sys.stdout.write")
            if makes and not own and (path.name, name) not in ALLOWED:
                wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


ALLOWED = {
    ("commands_basic.py", "click.echo"),  # the script for a shell, which click wrote
    ("demo_table.py", "Text"),  # VERIFIED, our own
    ("demo_table.py", "Console"),  # into a string
}
