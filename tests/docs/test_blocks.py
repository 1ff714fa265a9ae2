"""What the documents tell to type works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .blocks import PAGES, ROOT, blocks, script

WITH_COMMANDS = [page for page in PAGES if any(not block.why for block in blocks(page))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_a_block_is_a_shells_and_nothing_stands_behind_a_command(page: Path) -> None:
    said = subprocess.run(["bash", "-n"], input=script(page), text=True, capture_output=True, check=False)
    assert said.stderr == ""
    assert re.findall(r"^kvmmig .* {3,}.*$", script(page), re.MULTILINE) == []


def test_a_block_that_is_not_run_says_why() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert not block.why or len(block.why.split()) >= 3, f"{page}:{block.line}"


def test_the_readme_has_commands_that_are_run() -> None:
    assert sum(not block.why for block in blocks(ROOT / "README.md")) >= 4


@pytest.mark.kvm
def test_the_readmes_python_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    saved = tmp_path / "dirtier.img"
    exec(snippet.replace("/var/tmp/dirtier.img", str(saved)), {"__name__": "readme"})
    downtime, stall = map(float, capfd.readouterr().out.split())
    assert downtime > 0
    assert stall >= 0
    assert saved.stat().st_size > 64 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    """Somewhere to type commands: machines of its own, which are ended again."""
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as folder:
        path = Path(folder)
        yield path
        for lock in path.glob("kvmmig/*.lock"):
            quit_it = [sys.executable, "-m", "kvmmig", "quit", lock.stem]
            subprocess.run(quit_it, env={**os.environ, "XDG_RUNTIME_DIR": folder}, check=False)


@pytest.mark.slow
@pytest.mark.kvm
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_commands_work_as_they_stand_there(page: Path, place: Path) -> None:
    assert shutil.which("bash"), "the documents' commands are bash's"
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(place), "PATH": programs, "HOME": str(place)}
    said = subprocess.run(
        ["bash"],
        input=script(page),
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    assert said.returncode == 0, said.stdout
