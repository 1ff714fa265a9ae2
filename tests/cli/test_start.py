"""A command imports what it needs: who only looks does not wait for what moves guests."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [("kvmmig.cli.app", {"numpy", "trio", "rich", "msgspec"}), ("kvmmig.cli.listing", {"numpy", "keystone"})],
)
def test_what_a_command_does_not_need_is_not_imported(module: str, absent: set[str]) -> None:
    program = f"import sys, {module}; print(*sorted({absent!r} & sys.modules.keys()))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []
