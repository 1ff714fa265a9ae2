"""What the documents say of the code is true."""

from __future__ import annotations

import ast
import re
import subprocess
import textwrap
from pathlib import Path

import click
import pytest

from kvmmig import errors
from kvmmig.cli.app import cli
from kvmmig.migration.policy import Limits

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
_COMMAND = re.compile(r"(?:^|[$|;] |\$\()kvmmig (?P<name>[a-z-]+)(?P<rest>[^|;#]*)")
_LINE = re.compile(r"^(?P<indent>[│ ├└─]*)(?P<name>[A-Z]\w+)(?: {2,}.*)?$")


def drawn_tree(text: str) -> dict[str, str]:
    """A drawn tree as {class: its parent}."""
    parents: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    lines = text[text.index("KvmmigError\n") :].splitlines()
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            break
        depth = len(match["indent"])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        if stack:
            parents[match["name"]] = stack[-1][1]
        stack.append((depth, match["name"]))
    return parents


def real_tree() -> dict[str, str]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KvmmigError)]
    return {c.__name__: c.__bases__[0].__name__ for c in classes if c is not errors.KvmmigError}


def test_the_error_tree_is_drawn_as_it_is() -> None:
    doc = ast.get_docstring(ast.parse(Path(errors.__file__).read_text()))
    assert doc is not None
    drawn = textwrap.dedent(doc[doc.index("    KvmmigError") :])
    assert drawn_tree(drawn) == real_tree()
    assert drawn_tree((ROOT / "docs/architecture.md").read_text()) == real_tree()


def test_the_limits_are_written_down_as_they_are() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for words, seconds in [
        ("one step", Limits().step),
        ("connecting", Limits().connect_timeout),
        ("the other side's answer to the hello", Limits().setup_timeout),
        ("not one byte accepted", Limits().stall_timeout),
        (
            "the other side's `ready`; the disk's word; a reader's taking all before `go`",
            Limits().handover_timeout,
        ),
    ]:
        written = f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"
        assert f"| {words} | {written} |" in text


TARGETS = ["demo", "test", "bench", "pressure", "monitor", "faults", "soak", "api", "docs", "clean"]


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_what_the_readme_tells_to_type(target: str) -> None:
    assert f"make {target}" in (ROOT / "README.md").read_text()
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def anchors(page: Path) -> set[str]:
    """What can be linked to in a page, as GitHub names it."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]*)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def typed(page: Path) -> list[tuple[str, str]]:
    """The commands that a page's blocks of code have, each with the rest of its line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [(found["name"], found["rest"]) for line in lines for found in _COMMAND.finditer(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_are_there(page: Path) -> None:
    for name, rest in typed(page):
        command = cli.commands.get(name)
        if isinstance(command, click.Group) and rest.strip():
            command = command.commands.get(rest.split()[0])
        assert isinstance(command, click.Command), f"kvmmig {name}{rest}"
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known | {"--help"}, f"kvmmig {name}{rest}"


def test_commands_are_found_in_the_pages_that_have_them() -> None:
    assert len(typed(ROOT / "README.md")) >= 8
    assert len(typed(ROOT / "docs/commands.md")) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_knows_what_a_page_tells_to_type(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_file_that_a_page_names_is_there(page: Path) -> None:
    folders = "kvmmig|transports|tests|examples|bench|docs|requirements"
    named = re.findall(rf"`((?:{folders})/[\w./*-]+)", page.read_text())
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/.")))] == []
