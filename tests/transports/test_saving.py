"""What file and pipe promise about the file: whole and durable, or not there and the older one untouched."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.transport import ReceiveChannel, SendChannel, Transport, TransportURI
from tests.transports.using import connect, read_all, send_all

Make = Callable[[str | TransportURI], Transport]

both = pytest.mark.parametrize("scheme", ["file", "pipe"])
_DATA = random.Random(5).randbytes((9 << 20) + 777)


async def _send_for_ever(channel: SendChannel) -> None:
    with trio.fail_after(60):
        while True:
            await channel.send_some([memoryview(_DATA)])


async def _send_and_close(channel: SendChannel, data: bytes) -> None:
    await send_all(channel, data)
    await channel.aclose()


async def _send_and_fail(transport: Transport) -> None:
    async with transport.connect() as channel:
        await send_all(channel, _DATA)
        raise RuntimeError("not today")


async def _until(true: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110 - a thread tells nobody
            await trio.sleep(0.005)


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def _read_on(channel: ReceiveChannel, buffer: memoryview) -> None:
    while await channel.receive_some(buffer):
        pass


@both
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4 << 20, (4 << 20) + 1, (8 << 20) - 512, len(_DATA)])
@pytest.mark.parametrize("direct", ["on", "off"])
async def test_every_length_comes_back(
    scheme: str, size: int, direct: str, transport: Make, tmp_path: Path
) -> None:
    saved = transport(f"{scheme}:{tmp_path}/a.img?direct={direct}")
    async with saved.connect() as channel:
        await send_all(channel, _DATA[:size])
    assert (tmp_path / "a.img").read_bytes() == _DATA[:size]
    assert await read_all(saved) == _DATA[:size]


@both
async def test_only_its_owner_may_read_it(scheme: str, transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_text("older")
    path.chmod(0o644)
    async with transport(f"{scheme}:{path}").connect() as channel:
        await send_all(channel, b"secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@both
async def test_an_older_file_survives_until_the_new_one_is_whole(
    scheme: str, transport: Make, tmp_path: Path
) -> None:
    path = tmp_path / "a.img"
    path.write_text("older")
    async with transport(f"{scheme}:{path}").connect() as channel:
        await send_all(channel, _DATA)
        await channel.flush()
        assert path.read_text() == "older"
        channel.abort()
        assert path.read_text() == "older"
        with pytest.raises(RuntimeError, match="not today"):
            await _send_and_fail(transport(f"{scheme}:{path}"))
        assert path.read_text() == "older"
        async with transport(f"{scheme}:{path}").connect() as channel:
            await send_all(channel, _DATA)
        assert path.read_bytes() == _DATA
        assert _names(tmp_path) == ["a.img"]


@both
async def test_a_cancelled_aclose_publishes_nothing(scheme: str, transport: Make, tmp_path: Path) -> None:
    async with transport(f"{scheme}:{tmp_path}/a.img").connect() as channel:
        await send_all(channel, _DATA)
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.aclose()
        assert scope.cancelled_caught
        with pytest.raises(ChannelClosed):
            await channel.send_some([memoryview(b"x")])
        assert not (tmp_path / "a.img").exists()


@both
async def test_a_cancelled_connect_leaves_nothing(scheme: str, transport: Make, tmp_path: Path) -> None:
    for delay in (0.0, 0.001, 0.003, 0.01):
        with trio.move_on_after(delay):
            await connect(transport(f"{scheme}:{tmp_path}/a.img"))
    await _until(lambda: not _names(tmp_path))  # a thread tidies up


@both
async def test_a_symbolic_link_is_followed(scheme: str, transport: Make, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/a.img")
    async with transport(f"{scheme}:{tmp_path}/link").connect() as channel:
        await send_all(channel, b"through it")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.img").read_bytes() == b"through it"


@both
async def test_what_is_no_regular_file_is_refused(scheme: str, transport: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, kind in (
        ("/dev/null", "a character device"),
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a named pipe"),
    ):
        with pytest.raises(ConnectFailed, match=f"can't write {path}: it is {kind}; name a regular file"):
            await connect(transport(f"{scheme}:{path}"))
        with pytest.raises(ConnectFailed, match=f"can't read {path}: it is {kind}; name a regular file"):
            await read_all(transport(f"{scheme}:{path}"))
    with pytest.raises(BadURI, match=f"names no file: write {scheme}:PATH"):
        transport(f"{scheme}:")


@both
async def test_missing_places_are_one_sentence(scheme: str, transport: Make, tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match=r"there is no directory .*/nowhere; make it first"):
        await connect(transport(f"{scheme}:{tmp_path}/nowhere/a.img"))
    with pytest.raises(ConnectFailed, match=r"can't read .*/a.img: there is no such file"):
        await read_all(transport(f"{scheme}:{tmp_path}/a.img"))


@both
@pytest.mark.parametrize("direct", ["on", "off"])
async def test_a_full_disk_is_one_sentence_and_the_older_file_survives(
    scheme: str, direct: str, transport: Make, small_disk: Path
) -> None:
    path = small_disk / "a.img"
    path.write_text("older")
    async with transport(f"{scheme}:{path}?direct={direct}").connect() as channel:
        with pytest.raises(ChannelBroken, match=r"can't write .*/a.img.*[Nn]o space"):
            await _send_for_ever(channel)
        with pytest.raises(ChannelBroken, match=r"[Nn]o space"):
            await channel.send_some([memoryview(b"x")])
        with pytest.raises(ChannelBroken, match=r"[Nn]o space"):
            await channel.aclose()
        await channel.aclose()
        assert path.read_text() == "older"
        assert _names(small_disk) == ["a.img"]


@both
async def test_a_full_disk_is_noticed_by_aclose_at_the_latest(
    scheme: str, transport: Make, small_disk: Path
) -> None:
    async with transport(f"{scheme}:{small_disk}/a.img").connect() as channel:
        with pytest.raises(ChannelBroken, match=r"[Nn]o space"), trio.fail_after(60):
            await _send_and_close(channel, _DATA)
        channel.abort()
        assert not _names(small_disk)


@both
async def test_without_unnamed_files_a_partial_one_is_used_and_removed(
    scheme: str, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, os.O_TMPFILE, errno.EOPNOTSUPP)
    async with transport(f"{scheme}:{tmp_path}/a.img").connect() as channel:
        await send_all(channel, _DATA)
        partial, claim = _names(tmp_path)
        assert partial.startswith(".a.img.")
        assert partial.endswith(".partial")
        assert claim == ".a.img.saving"
        channel.abort()
        async with transport(f"{scheme}:{tmp_path}/a.img").connect() as channel:
            await send_all(channel, _DATA)
        assert (tmp_path / "a.img").read_bytes() == _DATA


@both
async def test_without_direct_io_there_is_a_notice(
    scheme: str, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, os.O_DIRECT, errno.EINVAL)
    saved = transport(f"{scheme}:{tmp_path}/a.img")
    async with saved.connect() as channel:
        assert "refuses O_DIRECT" in channel.notices[0]
        await send_all(channel, _DATA)
    async with saved.listen() as listener, listener.accept() as channel:
        assert "refuses O_DIRECT" in channel.notices[0]
    assert await read_all(saved) == _DATA


async def test_flushed_bytes_are_in_the_file_and_more_may_follow(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse(monkeypatch, os.O_TMPFILE, errno.EOPNOTSUPP)  # so that the file can be looked at
    async with transport(f"file:{tmp_path}/a.img").connect() as channel:
        sent = 0
        for size in (10, 4090, 1, 5 << 20, 0, 4096, 100):
            await send_all(channel, _DATA[sent : sent + size])
            sent += size
            await channel.flush()
            partial = next(name for name in _names(tmp_path) if name.endswith(".partial"))
            assert (tmp_path / partial).read_bytes() == _DATA[:sent]
        await channel.aclose()
        assert (tmp_path / "a.img").read_bytes() == _DATA[:sent]


async def test_nothing_is_added_to_a_block_that_is_being_written(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda _: alive.wait())
    async with transport(f"file:{tmp_path}/a.img").connect() as channel:
        await send_all(channel, b"before ")
        with trio.move_on_after(0.05) as scope:
            await channel.flush()
        assert scope.cancelled_caught
        with trio.move_on_after(0.05) as scope:
            await channel.send_some([memoryview(b"never")])
        assert scope.cancelled_caught
        alive.set()
        await _send_and_close(channel, b"after")
        assert (tmp_path / "a.img").read_bytes() == b"before after"


async def test_the_disk_has_what_was_written_long_before_the_flush(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush at the end is what a guest stands still for."""
    synced = trio.Event()
    token = trio.lowlevel.current_trio_token()
    monkeypatch.setattr(os, "fdatasync", lambda _: token.run_sync_soon(synced.set))
    async with transport(f"file:{tmp_path}/a.img").connect() as channel:
        piece = memoryview(bytes(4 << 20))
        with trio.fail_after(60):
            while not synced.is_set():
                await channel.send_some([piece])
        channel.abort()


async def test_a_file_that_shrinks_while_it_is_read_is_an_error(transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(64 << 20))
    buffer = memoryview(bytearray(1 << 20))
    async with transport(f"file:{path}").listen() as listener, listener.accept() as channel:
        await channel.receive_some(buffer)
        os.truncate(path, 5000)
        with pytest.raises(ChannelBroken, match=r"can't read .*: it became shorter"):
            await _read_on(channel, buffer)


async def test_an_abort_does_not_wait_for_a_disk_that_hangs(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()
    write = os.pwrite

    def hang(fd: int, data: memoryview, offset: int) -> int:
        alive.wait()
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", hang)
    async with transport(f"file:{tmp_path}/a.img").connect() as channel:
        await send_all(channel, _DATA)
        with trio.move_on_after(0.05) as scope:
            await channel.flush()
        assert scope.cancelled_caught
        channel.abort()
        with pytest.raises(ChannelClosed):
            await channel.flush()
        alive.set()  # and when the disk comes back, the thread closes the file: nothing_left looks


async def test_an_abort_while_aclose_publishes_wakes_it(
    transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: alive.wait())
    for scheme in ("file", "pipe"):
        async with transport(f"{scheme}:{tmp_path}/{scheme}.img").connect() as channel:
            await send_all(channel, b"never to be seen")
            async with trio.open_nursery() as nursery:

                async def close(channel: SendChannel) -> None:
                    with pytest.raises(ChannelClosed):
                        await channel.aclose()

                nursery.start_soon(close, channel)
                await trio.testing.wait_all_tasks_blocked(0.2)
                channel.abort()
    alive.set()
    for thread in threading.enumerate():
        if thread.name.startswith(("write", "end of")):
            await trio.to_thread.run_sync(thread.join)
    assert not _names(tmp_path)


def _refuse(monkeypatch: pytest.MonkeyPatch, flag: int, number: int) -> None:
    """A file system that knows nothing of this flag."""
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & flag == flag:
            raise OSError(number, os.strerror(number))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
