"""The examples run, print what they promise, and stay short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


@pytest.mark.kvm
def test_live_migration_moves_a_guest_and_proves_it() -> None:
    printed = run("live_migration.py")
    assert re.search(r"source: round 0: \d+ pages sent, \d+ written meanwhile\n", printed)
    assert re.search(r"source: moved; the guest was stopped for [\d.]+ \w+\n", printed)
    assert re.search(r"destination: dirtier: all \d+ pages are right after \d+ passes\n", printed)


@pytest.mark.kvm
def test_own_transport_carries_a_guest() -> None:
    assert run("own_transport.py") == "the guest is running at the other end\n"


@pytest.mark.kvm
def test_own_policy_decides_when_the_guest_stops() -> None:
    printed = run("own_policy.py").splitlines()
    assert 1 <= len(printed) - 1 <= 10
    assert re.fullmatch(r"round 0: dirtied \d+ pages, \d+ MB/s", printed[0])
    assert re.fullmatch(r"stopped: expected a downtime of [\d.]+ ms, it was [\d.]+ ms", printed[-1])


@pytest.mark.kvm
def test_drive_by_monitor_moves_a_guest_between_two_processes_and_tells_of_it() -> None:
    printed = run("drive_by_monitor.py").splitlines()
    statuses = [line.split()[1] for line in printed if line.startswith("MIGRATION ")]
    assert statuses == ["setup", "active", "device", "completed"]
    assert "STOP" in printed
    assert re.fullmatch(r"completed: \d+ bytes in \d+ ms", printed[-4])
    assert re.fullmatch(r"the guest stood still for [\d.]+ \w+", printed[-3])
    assert printed[-2:] == ["here: postmigrate", "there: running"]


# It runs seven ways of saving a guest beside each other, and a lab takes its parts.
LONGER = {"blackout.py": 370}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_under_100_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < LONGER.get(path.name, 100)
