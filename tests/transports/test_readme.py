"""What transports/README.md shows is what it says: it passes the suite, by the test that stands there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    STREAM_CHECKS,
    Check,
    Ends,
    memory_channel_pair,
    stream_ends,
)
from kvmmig.transport import TransportURI
from kvmmig.transport.registry import transport_for

_README = Path(__file__).parents[2] / "transports" / "README.md"


@pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
async def test_the_readmes_transport_passes_the_suite(check: Check, tmp_path: Path) -> None:
    test: Callable[[Check, Path], Awaitable[None]] = _names()["test_local"]
    await test(check, tmp_path)


@pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
async def test_the_readmes_wrapper_passes_the_suite(check: Check) -> None:
    async def ends() -> Ends:
        sender, receiver = memory_channel_pair()
        wrapper = names["CountingWrapper"](
            TransportURI.parse("count+tcp:x"), transport_for("tcp:127.0.0.1:1")
        )
        return stream_ends(await wrapper.wrap(sender), await wrapper.wrap(receiver))

    names = _names()
    await check(ends)


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL):
        exec(block, names)
    return names
