"""``make man``: man pages of all commands, made by Sphinx and sphinx-click from the commands themselves."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click

from kvmmig import __version__
from kvmmig.cli.app import ALIASES, cli

FOLDER = Path(__file__).parents[1] / "build/man/man1"
_PAGE = """\
{title}
{line}

.. click:: documented:{name}
   :prog: {program}
   :nested: {nested}
"""
# sphinx-click finds a command as a module's attribute.
_MODULE = """\
from kvmmig.cli.app import cli
globals().update(cli.commands)
"""
_CONF = """\
import sys
sys.path.insert(0, {folder!r})
extensions = ["sphinx_click"]
project = "kvmmig"
author = copyright = "The kvmmig developers"
version = release = {version!r}
root_doc = "kvmmig"
man_pages = {pages!r}
suppress_warnings = ["toc.not_included"]

def as_it_is(app, context, lines):
    lines[:] = [line.replace("tcp:", "tcp\\\\:") for line in lines]  # else it would be a link

def setup(app):
    for part in ("description", "options", "epilog"):
        app.connect(f"sphinx-click-process-{{part}}", as_it_is)
"""


def write(folder: Path) -> None:
    """Write kvmmig.1 and a kvmmig-COMMAND.1 for each command into a folder. Raises `CalledProcessError`."""
    commands = {name: command for name, command in cli.commands.items() if name not in ALIASES}
    pages = [("kvmmig", "kvmmig", "run tiny KVM guests and migrate them while they run", "", 1)]
    with tempfile.TemporaryDirectory() as source:
        _write_page(Path(source), "kvmmig", "cli", nested="short")
        for name, command in commands.items():
            _write_page(Path(source), f"kvmmig-{name}", name, nested="none")
            pages.append((f"kvmmig-{name}", f"kvmmig-{name}", _summary(command), "", 1))
        (Path(source) / "documented.py").write_text(_MODULE)
        (Path(source) / "conf.py").write_text(_CONF.format(folder=source, version=__version__, pages=pages))
        options = ["--quiet", "--fail-on-warning", "--builder", "man", "--doctree-dir", f"{source}/trees"]
        subprocess.run([sys.executable, "-m", "sphinx", *options, source, str(folder)], check=True)


def _write_page(folder: Path, page: str, name: str, *, nested: str) -> None:
    program = page.replace("-", " ", 1)
    text = _PAGE.format(title=page, line="=" * len(page), name=name, program=program, nested=nested)
    (folder / f"{page}.rst").write_text(text)


def _summary(command: click.Command) -> str:
    summary = command.get_short_help_str(limit=100).rstrip(".")
    return summary[0].lower() + summary[1:]


if __name__ == "__main__":
    write(FOLDER)
    print(f"man -M {FOLDER.parent} kvmmig")
