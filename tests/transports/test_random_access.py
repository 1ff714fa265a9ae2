"""What has random access passes the checks for it, what breaks a promise does not, and the guard holds it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import trio

from kvmmig.errors import ChannelBroken
from kvmmig.testing import RANDOM_ACCESS_CHECKS, Check, Nonconformance
from kvmmig.transport import RandomAccessChannel, TransportURI, transport_for
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.supervision import connected
from kvmmig.transport.toolkit import RandomAccessFile
from kvmmig_transports.file import FileTransport
from tests.transports.makers import maker_of, name_of

Pieces = Sequence[tuple[int, memoryview]]
PAGE = memoryview(bytes(4096))


@pytest.mark.usefixtures("everything_applies")
@pytest.mark.parametrize("check", RANDOM_ACCESS_CHECKS, ids=name_of)
@pytest.mark.parametrize("options", ["", "?direct=off"])
async def test_a_file_has_random_access(options: str, check: Check, tmp_path: Path) -> None:
    await check(maker_of(f"file:{{tmp}}/a.img{options}", tmp_path))


class Misplacing(RandomAccessFile):
    async def write_some(self, pieces: Pieces) -> int:
        return await super().write_some([(offset + 4096, data) for offset, data in pieces])


class Ignoring(RandomAccessFile):
    async def write_some(self, pieces: Pieces) -> int:
        with trio.CancelScope(shield=True):
            count = await super().write_some(pieces)
        return count  # noqa: RET504 - mypy takes a return from within the scope for none


class Late(RandomAccessFile):
    """Reads its buffers when it is closed."""

    _kept: list[tuple[int, memoryview]]

    async def write_some(self, pieces: Pieces) -> int:
        await trio.lowlevel.checkpoint()
        self._kept = [*getattr(self, "_kept", []), *pieces]
        return sum(len(data) for _, data in pieces)

    async def aclose(self) -> None:
        while kept := self._kept[:1]:
            assert await super().write_some(kept) == len(kept[0][1])
            del self._kept[:1]
        await super().aclose()


class Boasting(RandomAccessFile):
    async def write_some(self, pieces: Pieces) -> int:
        return await super().write_some(pieces) + 4096


class Mutant(FileTransport):
    channel: ClassVar[type[RandomAccessFile]]

    @asynccontextmanager
    async def connect_random_access(self) -> AsyncIterator[RandomAccessChannel]:
        async with await self.channel.open(self.uri.target, direct=False) as channel:
            yield channel


@pytest.mark.parametrize(
    ("channel", "name", "sentence"),
    [
        (Misplacing, "bytes_are_found_at_their_offsets", "not what was written"),
        (Boasting, "bytes_are_found_at_their_offsets", "says it took"),
        (Ignoring, "cancelled_write_accepts_nothing", "ignored a cancel"),
        (Late, "settled_buffers_can_be_used_again", "after settle had returned"),
    ],
)
async def test_what_breaks_a_promise_is_caught(
    channel: type[RandomAccessFile],
    name: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Mutant, "channel", channel, raising=False)
    check = next(check for check in RANDOM_ACCESS_CHECKS if name_of(check) == name)
    with pytest.raises(Nonconformance, match=sentence):
        await check(lambda: Mutant(TransportURI("file", str(tmp_path / "a.img"))))


class Strange(RandomAccessChannel):
    """Answers as the test wants it."""

    peer = "a test's file"

    def __init__(self, answer: Callable[[], Awaitable[int]]) -> None:
        self._answer = answer

    async def write_some(self, pieces: Pieces) -> int:
        return await self._answer()

    async def settle(self) -> None: ...

    async def flush(self) -> None: ...

    def abort(self) -> None: ...

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("count", [0, -4096, 100, 8192, None, True])
async def test_a_count_that_is_none_breaks_the_channel(count: int) -> None:
    async def answer() -> int:
        await trio.lowlevel.checkpoint()
        return count

    channel = GuardedChannel(Strange(answer), "the transport 'strange'")
    with pytest.raises(ChannelBroken, match=f"returned {count} from write_some where 4096 bytes were"):
        await channel.write_some([(0, PAGE)])
    with pytest.raises(ChannelBroken):
        await channel.settle()


async def test_an_exception_of_any_class_is_named_with_its_transport() -> None:
    async def answer() -> int:
        raise KeyError("page 7")

    channel = GuardedChannel(Strange(answer), "the transport 'strange'")
    with pytest.raises(ChannelBroken, match="'strange' raised KeyError: 'page 7' from write_some"):
        await channel.write_some([(0, PAGE)])


async def test_a_disk_that_fails_breaks_the_channel_and_nothing_appears(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    async with trio.open_nursery() as strays:
        async with connected(transport_for(f"file:{path}"), strays, random_access=True) as channel:
            beyond = (1 << 62) - 4096  # no file system has files so long
            await channel.write_some([(beyond, PAGE)])
            with pytest.raises(ChannelBroken, match=r"can't write .*a\.img: it grew beyond the largest file"):
                await channel.flush()
    assert not path.exists()
