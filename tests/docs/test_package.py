"""What PyPI, pip and the public CI are told of the package is said in one place, and true."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path

import kvmmig

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHON = re.compile(r"Programming Language :: Python :: (3\.\d+)")


def test_the_version_stands_once() -> None:
    assert version("kvmmig") == kvmmig.__version__
    assert "version" in PROJECT["dynamic"]


def test_the_changelog_begins_with_this_version() -> None:
    (first, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first in (kvmmig.__version__, "Unreleased")


def test_the_pythons_it_names_are_those_of_the_public_ci() -> None:
    named = PYTHON.findall("\n".join(PROJECT["classifiers"]))
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert matrix is not None
    assert re.findall(r"[\d.]+", matrix[1]) == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_readme_on_pypi_has_no_relative_links() -> None:
    text = metadata("kvmmig").json["description"]
    assert isinstance(text, str)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) >= 10
    assert [link for link in links if not link.startswith(("https:", "#"))] == []
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text)
    assert picture.startswith("https://raw.githubusercontent.com/")  # a page about it would show nothing
    assert picture.endswith("/docs/migration.svg")


def test_every_tool_is_pinned() -> None:
    pinned = (ROOT / "requirements/constraints.txt").read_text().lower().replace("_", "-")
    wanted = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    names = {re.split(r"[>=<\[]", one)[0] for one in [*wanted, *PROJECT["dependencies"]]} - {"kvmmig"}
    assert {name for name in names if f"\n{name}==" not in pinned} == set()
