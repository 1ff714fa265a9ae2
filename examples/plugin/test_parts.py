"""Both keep the contract: kvmmig's own suite says so. And what is stored is all there, or nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvmmig_parts.compression import ZlibWrapper
from kvmmig_parts.parts import PartsTransport

from kvmmig.testing import CHECKS, Check, MemoryTransport, checks_for
from kvmmig.transport import TransportURI


@pytest.mark.parametrize("check", checks_for(stores=True))
async def test_parts(check: Check, tmp_path: Path) -> None:
    await check(lambda: PartsTransport(TransportURI("parts", str(tmp_path / "guest"), {"size": "1MiB"})))


@pytest.mark.parametrize("check", CHECKS)
async def test_zlib(check: Check) -> None:
    uri = TransportURI("memory", "a", wrappers=("zlib",))
    await check(lambda: ZlibWrapper(uri, MemoryTransport(uri.unwrapped()[1])))


def sizes(directory: Path) -> list[int]:
    return sorted(path.stat().st_size for path in directory.glob("guest.*"))


async def test_a_new_guest_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    transport = PartsTransport(TransportURI("parts", str(tmp_path / "guest"), {"size": "4KiB"}))
    for size, parts in ((10_000, [1808, 4096, 4096]), (5_000, [904, 4096])):
        async with transport.connect() as channel:
            rest = memoryview(bytes(size))
            while rest:
                rest = rest[await channel.send_some([rest]) :]
        assert sizes(tmp_path) == parts


async def test_what_is_aborted_leaves_no_file(tmp_path: Path) -> None:
    transport = PartsTransport(TransportURI("parts", str(tmp_path / "guest"), {"size": "4KiB"}))
    async with transport.connect() as channel:
        for _ in range(2):
            await channel.send_some([memoryview(bytes(4096))])
        await channel.flush()
        assert sizes(tmp_path) == [4096, 4096]
        channel.abort()
    assert sizes(tmp_path) == []
