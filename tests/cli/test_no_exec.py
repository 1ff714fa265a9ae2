"""``--no-exec``: whoever controls a machine has it start no program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

Command = Callable[..., tuple[int, str, str]]
SENTENCE = "this machine was told (--no-exec)"


def test_a_command_has_it_start_none_new_or_restored(
    background: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    image, touched = tmp_path / "a.img", tmp_path / "touched"
    name = background("run", "echo", "--memory", "4MiB", "--no-exec")
    status, _, said = command("migrate", name, f"exec:touch {touched}")
    assert (status, SENTENCE in said) == (1, True)
    status, _, said = command("save", name, str(image))
    assert status == 0, said
    name = background("restore", str(image), "--no-exec")
    status, _, said = command("migrate", name, f"exec:touch {touched}")
    assert (status, SENTENCE in said) == (1, True)
    assert not touched.exists()
    assert command("quit", name)[0] == 0
