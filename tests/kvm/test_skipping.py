"""The tests themselves: without KVM they are skipped, and say so at the very end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_KVM = """
import sys, pytest
from kvmmig.errors import KvmUnavailable
from kvmmig.kvm import System

def none(path="/dev/kvm"):
    raise KvmUnavailable("no KVM in this house")

System.open = none
sys.exit(pytest.main(["-q", *sys.argv[1:]]))
"""


def last_line(*selection: str) -> str:
    here = Path(__file__).parent
    command = [sys.executable, "-c", WITHOUT_KVM, "-p", "no:cacheprovider", *selection]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_without_kvm_the_last_line_says_how_many_tests_were_skipped_and_why() -> None:
    selection = "test_vm.py::test_closing_twice_is_fine", "test_vm.py::test_pit_state_round_trips"
    assert last_line(*selection) == "kvm: 2 tests skipped: no KVM in this house"


def test_where_no_test_needs_kvm_nothing_is_said_of_it() -> None:
    assert not last_line("test_ioctl.py").startswith("kvm:")
