"""A save that is killed at any moment leaves the older file, or the new one, whole; and no third thing."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.transport import Transport, TransportURI
from tests.transports.saver import save_and_be_killed, saved
from tests.transports.using import send_all

Make = Callable[[str | TransportURI], Transport]

_PIECES = 64
_LONGEST = 0.3  # seconds: about as long as such a save takes
_WHOLE = saved(_PIECES)

each = pytest.mark.parametrize("scheme", ["file", "pipe"])
either = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])


@each
@either
async def test_a_killed_save_leaves_one_whole_file(
    scheme: str, named: bool, transport: Make, tmp_path: Path
) -> None:
    for moment in range(1, 5):
        await _kill_once(transport, scheme, tmp_path, moment * _LONGEST / 5, named=named)


@pytest.mark.slow
@each
@either
async def test_75_killed_saves_leave_one_whole_file(
    scheme: str, named: bool, transport: Make, tmp_path: Path
) -> None:
    chance = random.Random(f"{scheme} {named}")
    for _ in range(75):
        await _kill_once(transport, scheme, tmp_path, chance.random() * _LONGEST, named=named)


@pytest.mark.slow
@each
@pytest.mark.parametrize("call", ["linkat", "renameat", "unlinkat", "fsync", "flock"])
async def test_a_save_killed_at_a_system_call_leaves_one_whole_file(
    scheme: str, call: str, transport: Make, tmp_path: Path
) -> None:
    """By strace's injection, at each of the first six such calls."""
    for when in range(1, 7):
        await _kill_once(transport, scheme, tmp_path, 60.0, named=when % 2 == 0, at=f"{call}:{when}")


async def _kill_once(
    transport: Make, scheme: str, directory: Path, after: float, *, named: bool, at: str = ""
) -> None:
    path = directory / "a.img"
    path.write_bytes(b"older")
    ended = save_and_be_killed(f"{scheme}:{path}", _PIECES, after=after, named=named, at=at)
    found = path.read_bytes()
    assert found in (b"older", _WHOLE), len(found)
    assert not ended or found == _WHOLE
    async with transport(f"{scheme}:{path}").connect() as channel:
        await send_all(channel, b"next")
    assert path.read_bytes() == b"next"
    held = [name for name in os.listdir(directory) if name.endswith(".partial")]
    assert len(held) <= 1, "only a helper that has not ended yet may still hold one"
    if held:
        async with transport(f"{scheme}:{path}").connect() as channel:
            await send_all(channel, b"next")
