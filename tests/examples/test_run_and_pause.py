"""The example that runs and pauses a machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_and_pause.py"


@pytest.mark.kvm
def test_run_and_pause_sees_a_guest_stand_still_and_go_on() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=True)
    paused, later, resumed, ended = done.stdout.splitlines()
    match = re.fullmatch(r"\.\.\. the guest is paused at rip 0x1000\w\w; it has counted to (\d+)", paused)
    assert match
    assert int(match[1]) >= 3_000_000
    assert later == f"50 ms later it has counted to {match[1]}"
    assert resumed == "... the guest is running again, and counts on"
    assert ended == "the guest has ended: a command ended it"


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 100
