"""The assembler: what it makes, and how it tells where an error is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvmmig.errors import BadImage
from kvmmig.guests import ToyGuest, assemble, available
from tests.assembling import need_nasm


def code(source: str, directory: Path | None = None) -> bytes:
    need_nasm()
    return assemble(source, bits=64, origin=0x100000, name="my.asm", directory=directory)


@pytest.mark.parametrize("guest", available(), ids=lambda guest: guest.name)
def test_a_built_in_guest_is_what_nasm_makes_of_its_source(guest: ToyGuest) -> None:
    need_nasm()
    assert guest.image == guest.assembled(), f'say "make guests", and commit {guest.name}.bin'


def test_without_nasm_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadImage, match=r"^my\.asm: to assemble it takes nasm, .*\(apt install nasm"):
        assemble("nop", name="my.asm")


def test_what_a_source_does_not_say_holds_as_it_was_asked_for() -> None:
    assert code("mov rax, rbx\nhere: dq here") == b"\x48\x89\xd8" + (0x100003).to_bytes(8, "little")


def test_what_a_source_says_goes_before() -> None:
    assert code("  [BITS 16]\n[org 0x7c00]\nmov ax, here\nhere:") == b"\xb8\x03\x7c"


def test_it_includes_files_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "more.inc").write_text("nop\n")
    assert code('%include "more.inc"', tmp_path) == b"\x90"
    (tmp_path / "more.inc").write_text("\nbogus eax\n")
    with pytest.raises(BadImage, match=r"more\.inc:2: instruction expected"):
        code('%include "more.inc"', tmp_path)


WRONG = {
    "mnemonic": ("nop\n\nbogus eax  ; no such thing\nnop", 3, "instruction expected: bogus eax"),
    "a mnemonic alone": (
        "nop\nhltt\nnop",
        2,
        "label alone on a line without a colon might be in error: hltt",
    ),
    "operand": ("nop\nmov rax\nnop", 2, "invalid combination of opcode and operands: mov rax"),
    "missing symbol": ("nop\njmp nowhere\n", 2, "symbol `nowhere' not defined: jmp nowhere"),
    "redefined": ("a: nop\nb: nop\na: nop", 3, "label `a' inconsistently redefined: a: nop"),
    "unclosed string": ('nop\ndb "abc', 2, "expression syntax error: db"),
    "another assembler's comment": ("nop\n# a comment\nnop", 2, "for a comment begins with ';'"),
}


@pytest.mark.parametrize(("source", "line", "text"), WRONG.values(), ids=WRONG)
def test_an_error_names_file_line_and_text(source: str, line: int, text: str) -> None:
    with pytest.raises(BadImage) as caught:
        code(source)
    assert str(caught.value).startswith(f"my.asm:{line}: ")
    assert text in str(caught.value)
