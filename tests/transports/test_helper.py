"""The I/O helper process: ours, libvirt's, and those that go wrong."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import ChannelBroken, ConnectFailed
from kvmmig.transport import SendChannel, Transport, TransportURI
from kvmmig_transports import iohelper
from tests.transports.using import connect, read_all, send_all

Make = Callable[[str | TransportURI], Transport]
Script = Callable[[str], str]

_LIBVIRT = "/usr/lib/libvirt/libvirt_iohelper"
_DATA = random.Random(6).randbytes((9 << 20) + 777)


async def _send_for_ever(channel: SendChannel) -> None:
    with trio.fail_after(60):
        while True:
            await channel.send_some([memoryview(_DATA)])


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def _helper_pid() -> int:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
            return int(stat.parent.name)
    raise AssertionError("no helper is running")


@pytest.mark.skipif(not os.path.exists(_LIBVIRT), reason=f"{_LIBVIRT} is missing; install libvirt-daemon")
@pytest.mark.parametrize("size", [0, 1, 4096, 1 << 20, len(_DATA)])
@pytest.mark.parametrize("direct", ["on", "off"])
async def test_libvirts_helper_saves_and_restores(
    size: int, direct: str, transport: Make, tmp_path: Path
) -> None:
    saved = transport(f"pipe:{tmp_path}/a.img?direct={direct}&helper={_LIBVIRT}")
    async with saved.connect() as channel:
        await send_all(channel, _DATA[:size])
    assert (tmp_path / "a.img").read_bytes() == _DATA[:size]
    assert await read_all(saved) == _DATA[:size]


async def test_a_helper_is_searched_for_in_path(
    transport: Make, tmp_path: Path, program: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.path.basename(program("exec cat >/proc/self/fd/$2"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    async with transport(f"pipe:{tmp_path}/a.img?direct=off&helper={name}").connect() as channel:
        await send_all(channel, _DATA)
    assert (tmp_path / "a.img").read_bytes() == _DATA


async def test_a_helper_that_is_not_there_is_one_sentence(transport: Make, tmp_path: Path) -> None:
    for helper, where in (("/no/such", "there is no such program"), ("no-such", "no directory of PATH has")):
        with pytest.raises(ConnectFailed, match=f"can't start the I/O helper {helper}: {where}"):
            await connect(transport(f"pipe:{tmp_path}/a.img?helper={helper}"))
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x7fELF garbage")
    garbage.chmod(0o755)
    with pytest.raises(ConnectFailed, match=r"can't start the I/O helper .*garbage: Exec format error"):
        await connect(transport(f"pipe:{tmp_path}/a.img?helper={garbage}"))


async def _flush_for_ever(channel: SendChannel) -> None:
    with trio.fail_after(60):
        while True:
            await channel.flush()


async def _close(channel: SendChannel) -> None:
    with trio.fail_after(60):
        await channel.aclose()


@pytest.mark.parametrize("act", [_send_for_ever, _flush_for_ever, _close])
async def test_a_failing_helpers_words_and_status_are_the_error(
    act: Callable[[SendChannel], Awaitable[None]], transport: Make, tmp_path: Path, program: Script
) -> None:
    helper = program("echo disk on >&2; echo fire >&2; exit 3")
    async with transport(f"pipe:{tmp_path}/a.img?helper={helper}").connect() as channel:
        with pytest.raises(ChannelBroken, match=r"of .*/a.img ended with status 3; it said: disk on fire"):
            await act(channel)
        channel.abort()
        assert _names(tmp_path) == ["helper.sh"]


async def test_a_helper_that_ends_well_but_too_early_is_an_error(
    transport: Make, tmp_path: Path, program: Script
) -> None:
    async with transport(f"pipe:{tmp_path}/a.img?helper={program('exit 0')}").connect() as channel:
        with pytest.raises(ChannelBroken, match="ended before it had taken everything"), trio.fail_after(60):
            await send_all(channel, _DATA)
        channel.abort()


async def test_a_killed_helper_is_noticed_and_the_older_file_survives(
    transport: Make, tmp_path: Path
) -> None:
    path = tmp_path / "a.img"
    path.write_text("older")
    async with transport(f"pipe:{path}").connect() as channel:
        await send_all(channel, _DATA)
        os.kill(_helper_pid(), signal.SIGKILL)
        with pytest.raises(ChannelBroken, match="was killed by SIGKILL"):
            await _send_for_ever(channel)
        with pytest.raises(ChannelBroken, match="was killed by SIGKILL"):
            await channel.aclose()
        assert path.read_text() == "older"


async def test_a_dead_helper_is_noticed_though_its_child_holds_the_pipe(
    transport: Make, tmp_path: Path, program: Script
) -> None:
    # A shell gives a background command /dev/null to read, unless it is told otherwise.
    child = tmp_path / "child"
    helper = program(f"exec 3<&0; sleep 1000 <&3 & echo $! >{child}; exit 4")
    async with transport(f"pipe:{tmp_path}/a.img?helper={helper}").connect() as channel:
        with pytest.raises(ChannelBroken, match="ended with status 4"), trio.fail_after(60):
            await send_all(channel, _DATA)
        channel.abort()
        with trio.fail_after(60):
            await _end_of(int(child.read_text()))


async def _end_of(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended already
        pidfd = os.pidfd_open(pid)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


async def test_a_reading_helper_that_fails_is_not_the_end_of_the_stream(
    transport: Make, tmp_path: Path, program: Script
) -> None:
    (tmp_path / "a.img").write_bytes(_DATA)
    helper = program("echo data; echo half of it >&2; exit 5")
    with pytest.raises(ChannelBroken, match="ended with status 5; it said: half of it"), trio.fail_after(60):
        await read_all(transport(f"pipe:{tmp_path}/a.img?helper={helper}"))


async def test_a_reader_that_has_seen_enough_ends_the_helper(transport: Make, tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(_DATA)
    async with transport(f"pipe:{tmp_path}/a.img").listen() as listener, listener.accept() as channel:
        await channel.receive_some(memoryview(bytearray(1)))


@pytest.mark.parametrize("size", [0, 1, 4096, 4 << 20, (12 << 20) + 5])
def test_our_helper_by_itself_copies_both_ways(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    data = random.Random(7).randbytes(size)
    _run(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, data)
    assert path.read_bytes() == data
    assert _run(path, os.O_RDONLY | os.O_DIRECT, b"").stdout == data
    assert _run(path, os.O_RDONLY, b"").stdout == data


def test_our_helper_says_what_went_wrong_in_one_line(small_disk: Path) -> None:
    done = _run(small_disk / "a.img", os.O_WRONLY | os.O_CREAT, bytes(9 << 20))
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"can't write {small_disk}/a.img at byte ")
    assert done.stderr.decode().endswith(": No space left on device\n")
    assert done.stderr.count(b"\n") == 1
    assert _start("a.img", "99", b"").stderr == b"a.img: file descriptor 99: Bad file descriptor\n"
    assert _start("a.img", "x", b"").stderr == b"usage: iohelper.py FILENAME FD\n"


def _run(path: Path, flags: int, data: bytes) -> subprocess.CompletedProcess[bytes]:
    fd = os.open(path, flags, 0o600)
    try:
        return _start(str(path), str(fd), data, fd)
    finally:
        os.close(fd)


def _start(name: str, number: str, data: bytes, *fds: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-I", "-S", iohelper.__file__, name, number]
    return subprocess.run(command, input=data, capture_output=True, pass_fds=fds, timeout=60)


async def test_a_helper_that_is_stopped_is_named(transport: Make, tmp_path: Path) -> None:
    async with transport(f"pipe:{tmp_path / 'a.img'}").connect() as channel:
        assert channel.waits_for() == ""
        pid = _helper_pid()
        os.kill(pid, signal.SIGSTOP)
        with trio.fail_after(60):
            while not channel.waits_for():  # noqa: ASYNC110 - nothing tells when a process has stopped
                await trio.sleep(0.01)
        assert channel.waits_for().endswith(f"a.img (process {pid}) is stopped; SIGCONT lets it go on")
        channel.abort()
