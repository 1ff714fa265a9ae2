"""What a fuzzer has found worth keeping (see `tests.fuzz`) breaks nothing, and neither does half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_was_found_breaks_it(name: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert inputs, "python -m tests.fuzz --keep makes a corpus"
    for data in inputs:
        TARGETS[name](data)
        TARGETS[name](data[: len(data) // 2])
