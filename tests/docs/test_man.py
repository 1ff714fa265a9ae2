"""`make man` writes a page for each command, with all that its help says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from docs.man import write
from kvmmig.cli.app import ALIASES, cli


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "man1"
    write(folder)
    return folder


def test_every_command_has_a_page(pages: Path) -> None:
    wanted = {f"kvmmig-{name}.1" for name in cli.commands if name not in ALIASES} | {"kvmmig.1"}
    assert {path.name for path in pages.iterdir()} == wanted


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here to read them")
def test_a_page_has_the_options_the_statuses_and_the_examples(pages: Path) -> None:
    command = ["man", "-P", "cat", "-M", str(pages.parent), "kvmmig-migrate"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in ("--bandwidth", "Exit status:", "kvmmig migrate a tcp:192.0.2.7:4444"):
        assert text in shown
