"""docs/evening.md promises a core that can be read in one evening: what it names is there, and short."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/evening.md"
MOST_LINES = 1500
_ROW = re.compile(r"^\| \[`(?P<path>[^`]+)`\]\([^)]*\)(?:`:(?P<name>\w+)`)? \|", re.MULTILINE)
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(text: str, name: str | None = None) -> int:
    """How many lines of ``text``, or of the class or function in it, hold code."""
    tree = ast.parse(text)
    within = set(range(1, len(text.splitlines()) + 1))
    if name is not None:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        (part,) = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
        within = set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    documented = [
        node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    strings = {
        line for node in documented for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len((code - strings) & within)


def test_the_evening_has_at_most_1500_lines_of_code() -> None:
    named = [(row["path"], row["name"]) for row in _ROW.finditer(PAGE.read_text())]
    assert len(named) == len(re.findall(r"^\| \[", PAGE.read_text(), re.MULTILINE)) >= 10
    counted = {(path, name): lines_of_code((ROOT / path).read_text(), name) for path, name in named}
    assert sum(counted.values()) <= MOST_LINES, counted
    assert f"At most {MOST_LINES:,} lines" in PAGE.read_text()


_SAMPLE = '''"""One.

Two."""

# three
class A:
    """Four."""

    def b(self):
        return """five
six"""

x = 7
'''


def test_blank_lines_comments_and_docstrings_are_no_code() -> None:
    assert lines_of_code(_SAMPLE) == 5
    assert lines_of_code(_SAMPLE, "A") == 4
