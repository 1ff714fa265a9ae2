"""The soak, in a short form: the long one is ``make soak``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "bench" / "soak.py"


@pytest.mark.kvm
@pytest.mark.parametrize("seed", [5, pytest.param(7, marks=pytest.mark.slow)])  # these two once lost a page
def test_twenty_random_moves_lose_nothing(seed: int) -> None:
    command = [sys.executable, str(SOAK), "--moves", "20", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    assert "nothing was lost" in done.stdout
