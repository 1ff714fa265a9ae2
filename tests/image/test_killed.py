"""A save that is killed at any moment leaves one whole image under the name: the older one, or its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("times", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_one_whole_image(times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.image.killed", str(tmp_path), str(times), "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{times} saves were killed" in done.stdout
