from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_numbers.py"


@pytest.mark.kvm
@pytest.mark.parametrize(("arguments", "printed"), [([], "2 + 2 = 4\n"), (["3", "5"], "3 + 5 = 8\n")])
def test_two_numbers_prints_their_sum(arguments: list[str], printed: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == (printed, "", 0)


@pytest.mark.parametrize("arguments", [["7", "8"], ["x", "1"], ["1"], ["1", "2", "3"]])
def test_two_numbers_explains_what_it_can_add(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == "the guest prints one digit: give two numbers whose sum is at most 9\n"
    assert done.returncode == 1


def test_two_numbers_is_under_60_lines() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
