"""The most telling cells of the matrix; ``python -m tests.faults`` runs them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("transport", "fault", "moment"),
    [
        ("tcp", "link cut", "later round"),
        ("tcp", "peer stopped", "commit"),
        ("unix", "peer killed", "final pass"),
        ("pipe", "helper killed", "commit"),
        ("pipe", "disk full", "first round"),
        ("pipe", "frozen file system", "final pass"),
        ("file", "write error", "commit"),
        ("exec", "helper stopped", "later round"),
    ],
)
def test_the_guest_runs_on_and_the_user_reads_why(transport: str, fault: str, moment: str) -> None:
    command = [sys.executable, "-m", "tests.faults", "--json"]
    command += ["--only", transport, "--fault", fault, "--phase", moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    outcome = json.loads(done.stdout)
    if outcome["verdict"] == "unavailable":
        pytest.skip(outcome["reason"])
    assert outcome["problems"] == []
    assert (outcome["verdict"], done.returncode) == ("green", 0)
