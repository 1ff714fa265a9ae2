"""The assembler: what it makes, and how it tells where an error is."""

from __future__ import annotations

import pytest

from kvmmig.errors import BadImage
from kvmmig.guests import assemble


def code(source: str, **constants: int) -> bytes:
    return assemble(source, bits=64, origin=0x100000, constants=constants, name="my.asm")


def test_numbers_are_decimal_unless_they_say_otherwise() -> None:
    assert code("mov al, 10\nmov al, 0x10") == b"\xb0\x0a\xb0\x10"


def test_constants_are_symbols_of_the_source() -> None:
    assert code(".quad HOT, HOT / 4096", HOT=1 << 40) == (1 << 40).to_bytes(8, "little") + (1 << 28).to_bytes(
        8, "little"
    )


def test_labels_are_addresses_from_the_origin_on() -> None:
    assert code("nop\nhere: .quad here") == b"\x90" + (0x100001).to_bytes(8, "little")


@pytest.mark.parametrize(("bits", "expected"), [(16, b"\xb8\x01\x00"), (32, b"\x66\xb8\x01\x00")])
def test_bits_choose_the_mode(bits: int, expected: bytes) -> None:
    assert assemble("mov ax, 1", bits=bits, origin=0, constants={}, name="x") == expected  # type: ignore[arg-type]  # parametrized


def test_a_source_without_instructions_is_empty() -> None:
    assert code("# nothing") == b""


def test_comments_and_strings_may_hold_anything() -> None:
    assert code(".ascii \"[(#;'\"  # it's (\"a [comment\n// another's") == b"[(#;'"


WRONG = {
    "mnemonic": ("nop\n\nbogus eax  # no such thing\nnop", 3, "invalid mnemonic: bogus eax"),
    "operand": ("nop\nmov rax\nnop", 2, "invalid operand: mov rax"),
    "after a forward reference": ("jmp end\nnop\nbogus\nend: nop", 3, "invalid mnemonic: bogus"),
    "missing symbol": ("nop\njmp end\njmp nowhere\nend: nop", 3, "nothing is called 'nowhere': jmp nowhere"),
    "symbol in a macro": (
        ".macro A where\njmp \\where\n.endm\nnop\nA nowhere",
        5,
        "nothing is called 'nowhere': A nowhere",
    ),
    "in a macro": (".macro A\nbogus\n.endm\nnop\nA\nnop", 5, "invalid mnemonic: A"),
    "in a repetition": ("nop\n.rept 2\nnop\nbogus\n.endr\nnop", 4, "invalid mnemonic: bogus"),
    "in a condition": (".if 1\nnop\nbogus\n.endif\nnop", 3, "invalid mnemonic: bogus"),
    "redefined": ("a: nop\nb: nop\na: nop", 3, "a: nop"),
    "unclosed macro": ("nop\n.macro A\nnop\nnop", 2, "this block is never closed: .macro A"),
    "unclosed condition": ("nop\n.if 1\nnop\nnop", 2, "this block is never closed: .if 1"),
    "unclosed repetition": (".rept 2\nnop", 1, "this block is never closed: .rept 2"),
    "unclosed string": ('nop\n.ascii "abc', 2, "a quote is not closed"),
    "unclosed character": ("mov al, 'a", 1, "a quote is not closed"),
    "unclosed bracket": ("nop\nmov al, byte ptr [rax", 2, "a bracket is not closed"),
    "semicolon": ("nop ; a comment\nnop", 1, "';' separates two instructions; a comment starts with '#'"),
}


@pytest.mark.parametrize(("source", "line", "text"), WRONG.values(), ids=WRONG)
def test_an_error_names_file_line_and_text(source: str, line: int, text: str) -> None:
    with pytest.raises(BadImage) as caught:
        code(source, HOT=1, COLD=2)
    assert str(caught.value).startswith(f"my.asm:{line}: ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    ["mov rax, -SIZE", "lea rax, [rbx - SIZE]", "lea rax, [rbx + SIZE * 8]", "lea rax, [rbx + SIZE + SIZE]"],
)
def test_operands_that_would_be_assembled_wrongly_without_a_word_are_refused(wrong: str) -> None:
    with pytest.raises(BadImage, match=r"my\.asm:2: the assembler .* and use that"):
        code(f"SIZE = 8\n{wrong}")


def test_what_the_refusal_advises_is_right() -> None:
    advised = code("SIZE = 8\nMINUS = -SIZE\nlea rax, [rbx + MINUS]\nSUM = SIZE * 8\nlea rax, [rbx + SUM]")
    assert advised == code("lea rax, [rbx - 8]\nlea rax, [rbx + 64]")
