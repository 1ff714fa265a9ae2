"""The code keeps to the glossary: what docs/glossary.md rules out is no part of any name."""

from __future__ import annotations

import ast
import functools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kvmmig", "transports/kvmmig_transports", "examples", "bench")
_ROW = re.compile(r"^\| (?P<not>`[^|]*`) \| (?P<but>[^|]+) \|$", re.MULTILINE)


def forbidden() -> list[str]:
    page = (ROOT / "docs/glossary.md").read_text()
    rows = _ROW.finditer(page[page.index("## Words that are not used") :])
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row["not"])]


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def words(name: str) -> str:
    """The words of a name, each between underlines: ``_wait_for_go_`` of ``WaitForGo`` or ``wait_for_go``."""
    return "_" + "_".join(re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+", name)).lower() + "_"


@functools.cache
def names(path: Path) -> frozenset[str]:
    """Every name in a module, and its own."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    return frozenset({path.stem, *(token.string for token in tokens if token.type == tokenize.NAME)})


def methods(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, functions))


def uses(word: str, path: Path) -> set[str]:
    """The names in ``path`` that break the rule about ``word``."""
    if word.endswith(".py"):
        return {path.name} & {word}
    if "." in word:
        return set(methods(path)) & {word}
    if word[0].isupper():
        return set(names(path) & {word, f"_{word}"})
    return {name for name in names(path) if f"_{word}_" in words(name)}


def test_the_glossary_has_a_list_of_what_is_not_used() -> None:
    assert len(forbidden()) >= 10


@pytest.mark.parametrize("word", forbidden())
def test_a_word_that_the_glossary_rules_out_is_in_no_name(word: str) -> None:
    found = {str(path.relative_to(ROOT)): uses(word, path) for path in modules()}
    assert {path: used for path, used in found.items() if used} == {}


@pytest.mark.parametrize(
    ("word", "code", "used"),
    [
        ("story", "class TheStory: ...", {"TheStory"}),
        ("take_in", "def _take_in_later(): ...", {"_take_in_later"}),
        ("owed", "allowed = 1", set()),
        ("Place", "class _Place: ...", {"_Place"}),
        ("Place", "place = 1", set()),
        ("Machine.stop", "class Machine:\n    def stop(self): ...", {"Machine.stop"}),
        ("Machine.stop", "class Policy:\n    def stop(self): ...", set()),
        ("knock", '"knock"  # knock', set()),
    ],
)
def test_what_is_found(word: str, code: str, used: set[str], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(code + "\n")
    assert uses(word, tmp_path / "a.py") == used
