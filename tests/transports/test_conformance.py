"""Every channel that we ship passes the suite that we ship."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.migration.transport import Channel, Transport
from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    STORED_CHECKS,
    STREAM_CHECKS,
    Check,
    Ends,
    Maker,
    memory_channel_pair,
    stored_ends,
    stream_ends,
)

Make = Callable[[str], Transport]

_STREAM = (*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS)
_STORED = (*CHECKS, *STORED_CHECKS)


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def _saved(transport: Transport) -> Maker:
    async def receive() -> Channel:
        async with await transport.listen() as listener:
            return await listener.accept()

    async def make() -> Ends:
        return stored_ends(await transport.connect(), receive)

    return make


@pytest.mark.parametrize("check", _STREAM, ids=_name)
async def test_memory(check: Check) -> None:
    async def make() -> Ends:
        return stream_ends(*memory_channel_pair())

    await check(make)


# Without the two that move megabytes.
@pytest.mark.parametrize("check", _STREAM[2:], ids=_name)
async def test_memory_that_holds_one_byte(check: Check) -> None:
    async def make() -> Ends:
        return stream_ends(*memory_channel_pair(capacity=1))

    await check(make)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize("check", _STREAM, ids=_name)
async def test_tcp(check: Check, host: str, transport: Make) -> None:
    async def make() -> Ends:
        async with await transport(f"tcp:{host}:0").listen() as listener:
            sender = await transport(listener.uri).connect()
            return stream_ends(sender, await listener.accept())

    await check(make)


@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("check", _STORED, ids=_name)
async def test_file(check: Check, direct: str, transport: Make, tmp_path: Path) -> None:
    await check(_saved(transport(f"file:{tmp_path}/a.img?direct={direct}")))


@pytest.mark.parametrize("direct", ["on", "off"])
@pytest.mark.parametrize("check", _STORED, ids=_name)
async def test_pipe(check: Check, direct: str, transport: Make, tmp_path: Path) -> None:
    await check(_saved(transport(f"pipe:{tmp_path}/a.img?direct={direct}")))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
async def test_pipe_with_a_helper_that_takes_nothing(
    check: Check, transport: Make, tmp_path: Path, program: Callable[[str], str]
) -> None:
    await check(_saved(transport(f"pipe:{tmp_path}/a.img?helper={program('exec sleep 1000')}")))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
async def test_file_on_a_disk_that_hangs(
    check: Check, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()

    def hang(fd: int, data: memoryview, offset: int) -> int:
        alive.wait()
        return len(data)

    monkeypatch.setattr(os, "pwrite", hang)
    await check(_saved(transport(f"file:{tmp_path}/a.img")))
    alive.set()
