"""The transport in transports/README.md is one: it passes the suite, by the test that stands there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvmmig.testing import CHECKS, CLOGGED_CHECKS, STREAM_CHECKS, Check

_README = Path(__file__).parents[2] / "transports" / "README.md"


@pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
async def test_the_readmes_transport_passes_the_suite(check: Check, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL):
        exec(block, names)
    test: Callable[[Check, Path], Awaitable[None]] = names["test_unix"]
    await test(check, tmp_path)
