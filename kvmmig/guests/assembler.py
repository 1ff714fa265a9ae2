"""Intel-syntax assembly to bytes, with errors that name the line.

The assembler is keystone-engine, an LLVM in a wheel. It does not say where an error is or which symbol is
missing; it never returns from a quote that is not closed; and some operands it assembles wrongly without a
word. So this module looks at each line before keystone does, and searches for the line when it fails.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import keystone

from kvmmig.errors import BadImage

_MODES = {16: keystone.KS_MODE_16, 32: keystone.KS_MODE_32, 64: keystone.KS_MODE_64}
_QUOTED_OR_COMMENT = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])'|#.*|//.*""")
_DEFINITION = re.compile(r"^\s*(?:\.set\s+)?([A-Za-z_.$][\w.$]*)\s*(?::|=|,)", re.MULTILINE)
_NAME = re.compile(r"(?<![\w.$\\])[A-Za-z_.$][\w.$]*")
_CLOSERS = {".macro": ".endm", ".rept": ".endr", ".irp": ".endr", ".irpc": ".endr"}


def assemble(
    source: str, *, bits: Literal[16, 32, 64], origin: int, constants: Mapping[str, int], name: str
) -> bytes:
    """The machine code of ``source``, as it must lie at the address ``origin``.

    ``constants`` are defined before its first line, as ``NAME = value``. ``name`` is what errors call the
    source. Raises `BadImage` with the file, the line, its text and what is wrong with it.
    """
    lines = source.splitlines()
    bare = [_QUOTED_OR_COMMENT.sub(lambda found: "" if found[0][0] in "#/" else "0", line) for line in lines]
    symbols = set(constants) | set(_DEFINITION.findall("\n".join(bare)))
    for index, line in enumerate(bare):
        complaint = _complaint(line, symbols)
        if complaint:
            raise _bad_line(name, index, lines, complaint)

    defined = [f"{key} = {value:#x}" for key, value in constants.items()]
    try:
        return _keystone([*defined, *lines], bits, origin)
    except keystone.KsError as error:
        complaint = str(error).partition(" (KS_ERR")[0].lower()
        if error.errno == keystone.KS_ERR_ASM_SYMBOL_MISSING:
            missing = _missing_symbol([*defined, *lines], bits)
            index = next((i for i, line in enumerate(bare) if missing in _NAME.findall(line)), 0)
            raise _bad_line(name, index, lines, f"nothing is called {missing!r}") from error
        index = bisect_left(
            range(len(lines)), True, key=lambda i: _fails(defined, lines[: i + 1], bare, bits)
        )
        if index == len(lines):  # the first lines are right, and so is each but the last: a block is open
            index = next((start for start, _ in reversed(_open_blocks(bare))), index - 1)
            complaint = "this block is never closed"
        elif ";" in bare[index]:
            complaint += " (';' separates two instructions; a comment starts with '#')"
        raise _bad_line(name, index, lines, complaint) from error


def _keystone(lines: Sequence[str], bits: int, origin: int) -> bytes:
    engine = keystone.Ks(keystone.KS_ARCH_X86, _MODES[bits])
    code, _ = engine.asm("\n".join(lines).encode() + b"\n", origin, as_bytes=True)
    return bytes(code or b"")


def _missing_symbol(lines: Sequence[str], bits: int) -> str:
    """The first symbol that is used and not defined."""
    missing: list[str] = []

    def resolve(symbol: bytes, _value: Any) -> bool:
        missing.append(symbol.decode(errors="replace"))
        return False

    engine = keystone.Ks(keystone.KS_ARCH_X86, _MODES[bits])
    engine.sym_resolver = resolve  # only here: with a resolver, keystone reads all numbers as hexadecimal
    with suppress(keystone.KsError):
        engine.asm("\n".join(lines).encode() + b"\n", 0, as_bytes=True)
    return missing[0] if missing else ""


def _complaint(bare: str, symbols: set[str]) -> str:
    """What keystone would hang on or silently get wrong in a line without strings and comments."""
    if '"' in bare or "'" in bare:
        return "a quote is not closed"
    if bare.count("[") != bare.count("]") or bare.count("(") != bare.count(")"):
        return "a bracket is not closed"
    if bare.lstrip().startswith(".") or "=" in bare:
        return ""
    for minus in re.finditer(r"-\s*([A-Za-z_.$][\w.$]*)", bare):
        if minus[1] in symbols:
            return f"the assembler loses the minus before a name; write MINUS = -{minus[1]} and use that"
    for inside in re.findall(r"\[([^\]]*)\]", bare):
        used = [found for found in _NAME.finditer(inside) if found[0] in symbols]
        if len(used) > 1 or any(inside[found.end() :].lstrip()[:1] in ("*", "/") for found in used):
            return "the assembler takes one name and numbers in brackets; write SUM = ... and use that"
    return ""


def _fails(defined: Sequence[str], lines: Sequence[str], bare: Sequence[str], bits: int) -> bool:
    """Is there an error in these first lines of a source? Blocks that are still open are closed."""
    closers = [closer for _, closer in reversed(_open_blocks(bare[: len(lines)]))]
    try:
        _keystone([*defined, *lines, *closers], bits, 0)
    except keystone.KsError as error:
        # A symbol that is missing so far may be defined further on.
        return bool(error.errno != keystone.KS_ERR_ASM_SYMBOL_MISSING)
    return False


def _open_blocks(bare: Sequence[str]) -> list[tuple[int, str]]:
    """The blocks that these lines leave open, outermost first: where each begins, and what closes it."""
    blocks: list[tuple[int, str]] = []
    for index, line in enumerate(bare):
        word = (line.split() or [""])[0]
        closer = ".endif" if word.startswith(".if") else _CLOSERS.get(word)
        if closer:
            blocks.append((index, closer))
        elif blocks and word == blocks[-1][1]:
            blocks.pop()
    return blocks


def _bad_line(name: str, index: int, lines: Sequence[str], complaint: str) -> BadImage:
    return BadImage(f"{name}:{index + 1}: {complaint}: {lines[index].strip()}")
