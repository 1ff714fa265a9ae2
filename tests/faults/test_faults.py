"""The most telling cells of the matrix; ``python -m tests.faults`` runs them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.kvm

ROOT = Path(__file__).parents[2]


def outcomes(transport: str, fault: str, moment: str) -> list[dict[str, Any]]:
    """What came of these cells."""
    command = [sys.executable, "-m", "tests.faults", "--json"]
    command += ["--only", transport, "--fault", fault, "--phase", moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("transport", "fault", "moment"),
    [
        ("tcp", "link cut", "later round"),
        pytest.param("tcp", "peer stopped", "commit", marks=pytest.mark.slow),
        ("tcp", "peer killed", "handed over"),
        pytest.param("exec", "peer killed", "commit", marks=pytest.mark.slow),
        ("unix", "peer killed", "final pass"),
        ("pipe", "helper killed", "commit"),
        ("pipe", "disk full", "first round"),
        pytest.param("pipe", "frozen file system", "final pass", marks=pytest.mark.slow),
        pytest.param("file", "write error", "commit", marks=pytest.mark.slow),
        pytest.param("exec", "helper stopped", "later round", marks=pytest.mark.slow),
    ],
)
def test_the_guest_runs_on_and_the_user_reads_why(transport: str, fault: str, moment: str) -> None:
    (outcome,) = outcomes(transport, fault, moment)
    if outcome["verdict"] == "unavailable":
        pytest.skip(outcome["reason"])
    assert outcome["problems"] == []
    assert outcome["verdict"] == "green"


@pytest.mark.parametrize(
    ("misbehaviour", "point"),
    [
        ("too large a count", "go"),
        pytest.param("SystemExit", "commit", marks=pytest.mark.slow),
        pytest.param("never returns, shielded", "final pass", marks=pytest.mark.slow),
        ("ValueError", "close"),
    ],
)
def test_a_transport_that_breaks_the_contract_breaks_nothing_else(misbehaviour: str, point: str) -> None:
    found = outcomes("rogue", misbehaviour, point)
    assert {outcome["verdict"] for outcome in found} <= {"green", "impossible"}, found
    assert len([outcome for outcome in found if outcome["verdict"] == "green"]) >= 4
