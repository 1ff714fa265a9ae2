"""What is public: importable, lazy, documented, and all of the errors are among it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmig
from kvmmig import errors

NAMES = [name for name in kvmmig.__all__ if name != "__version__"]


def test_importing_kvmmig_imports_nothing_else() -> None:
    check = (
        "import sys; before = set(sys.modules); import kvmmig; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {"kvmmig"}


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(kvmmig.__file__).read_text())
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == kvmmig._HOMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(kvmmig, name) is not None
    assert name in dir(kvmmig)


def test_a_name_that_is_not_there_is_said_so() -> None:
    with pytest.raises(AttributeError, match="module 'kvmmig' has no attribute 'Nothing'"):
        _ = kvmmig.Nothing


def test_every_error_is_public() -> None:
    there = {name for name, what in vars(errors).items() if inspect.isclass(what)}
    assert there <= set(NAMES)


def undocumented(name: str) -> list[str]:
    """Itself and its public functions and properties, those of them that nothing is said about."""
    what = getattr(kvmmig, name)
    if not inspect.isclass(what):
        return [] if what.__doc__ else [name]
    found = [] if what.__doc__ else [name]
    for member, value in vars(what).items():
        described = isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
        if described and not member.startswith("_") and not inspect.getdoc(getattr(what, member)):
            found.append(f"{name}.{member}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_and_what_belongs_to_it_are_described(name: str) -> None:
    assert undocumented(name) == []
