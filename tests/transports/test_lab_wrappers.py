"""``zstd+``, ``checksum+`` and ``tap+``: they pass the suite, and do what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from kvmmig.cli.app import cli
from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed, KnobError, StreamError
from kvmmig.lab.streamdump import dump_stream
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.testing import CHECKS, Check, MemoryTransport
from kvmmig.testing.machine import FakeMachine
from kvmmig.transport import TransportURI, Wrapper, transport_for
from kvmmig_transports.checksum import ChecksumWrapper
from kvmmig_transports.tap import TapWrapper
from kvmmig_transports.zstd import ZstdWrapper

WRAPPERS: dict[str, type[ZstdWrapper | ChecksumWrapper | TapWrapper]] = {
    "zstd": ZstdWrapper,
    "checksum": ChecksumWrapper,
    "tap": TapWrapper,
}


def around_memory(name: str, tmp_path: Path) -> Wrapper:
    options = {"tap.path": str(tmp_path / "kept")} if name == "tap" else {}
    uri = TransportURI("memory", "a", options, wrappers=(name,))
    return WRAPPERS[name](uri, MemoryTransport(uri.unwrapped()[1]))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "name",
    # What zstd+ and checksum+ are made of is the same, and one of them is quicker.
    ["checksum", "tap", pytest.param("zstd", marks=pytest.mark.slow)],
)
async def test_the_suite(name: str, check: Check, tmp_path: Path) -> None:
    await check(lambda: around_memory(name, tmp_path))


async def saved(uri: str) -> OutgoingMigration:
    machine = FakeMachine()
    for page in range(0, 40, 3):
        machine.write(page, page + 1)
    migration = OutgoingMigration(machine, uri)
    with trio.fail_after(60):
        await migration.run()
    return migration


async def test_zstd_sends_less_and_says_so_and_its_level_can_be_turned(tmp_path: Path) -> None:
    migration = await saved(f"zstd+file:{tmp_path}/a.img?zstd.level=1")
    figures = migration.statistics()
    assert (tmp_path / "a.img").stat().st_size < figures.sent_bytes / 10
    assert figures.counters["zstd.ratio"] > 10
    assert migration.knobs["zstd.level"].value() == "1"
    migration.turn("zstd.level", "19")
    assert migration.knobs["zstd.level"].value() == "19"
    with pytest.raises(KnobError, match=r"zstd\.level: .*1 to 19"):
        migration.turn("zstd.level", "20")
    with pytest.raises(BadURI, match=r"zstd\.level: .*1 to 19"):
        transport_for("zstd+tcp:a:1?zstd.level=0")


async def through(uri: str, path: Path) -> bytes:
    """What comes out of a file that was written by a wrapper."""
    read = bytearray()
    buffer = memoryview(bytearray(1 << 16))
    async with transport_for(uri).listen() as listener, listener.accept() as channel:
        while count := await channel.receive_some(buffer):
            read += buffer[:count]
    return bytes(read)


@pytest.mark.parametrize("name", ["checksum", "zstd"])
async def test_damage_to_what_lies_on_a_disk_breaks_the_channel(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    await saved(f"{name}+file:{path}")
    assert (await through(f"{name}+file:{path}", path)).startswith(b"kvmmig\r\n")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if name == "checksum":
        path.write_bytes(data)
        with pytest.raises(ChannelBroken, match="damaged on the way"):
            await through(f"checksum+file:{path}", path)
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(ChannelBroken, match="ended inside of a frame"):
        await through(f"{name}+file:{path}", path)


async def test_what_tap_keeps_is_the_stream_and_dump_explains_it(tmp_path: Path) -> None:
    await saved(f"tap+file:{tmp_path}/a.img?tap.path={tmp_path}/kept")
    kept = tmp_path / "kept"
    assert kept.read_bytes() == (tmp_path / "a.img").read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600
    frames = list(dump_stream(kept))
    kinds = [frame.kind for frame in frames]
    assert kinds[:2] == ["PREAMBLE", "HELLO"]
    assert kinds[-3:] == ["SECTION", "END", "GO"]
    assert "PAGES" in kinds
    assert "14 pages: 0, 3, 6, 9 and 10 runs more" in next(
        each.words for each in frames if each.kind == "PAGES"
    )
    assert sum(frame.size for frame in frames) == kept.stat().st_size
    assert [frame.at for frame in frames][1:] == [frame.at + frame.size for frame in frames[:-1]]
    done = CliRunner().invoke(cli, ["stream", "dump", str(kept)])
    assert "cpu0/regs, version 1, 5 bytes" in done.output


async def test_dump_says_where_a_stream_is_wrong(tmp_path: Path) -> None:
    await saved(f"tap+file:{tmp_path}/a.img?tap.path={tmp_path}/kept")
    path = tmp_path / "torn"
    path.write_bytes((tmp_path / "kept").read_bytes()[:-40])
    with pytest.raises(StreamError, match=r"torn: the stream ends after \d+ bytes"):
        list(dump_stream(path))
    path.write_bytes(b"something else")
    with pytest.raises(StreamError, match="torn"):
        list(dump_stream(path))


async def test_a_tap_that_cannot_write_says_so_before_anything_is_sent_or_lets_the_guest_pass(
    tmp_path: Path,
) -> None:
    with pytest.raises(BadURI, match="from / on"):
        transport_for("tap+tcp:a:1?tap.path=kept")
    for path in (tmp_path, tmp_path / "none/kept", "/dev/full"):
        with pytest.raises(ConnectFailed, match="nothing can be kept in"):
            await saved(f"tap+file:{tmp_path}/a.img?tap.path={path}")
