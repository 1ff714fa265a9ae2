"""Two savers of one name, files that change meanwhile, and what killed savers have left."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed
from kvmmig.transport import Transport, TransportURI
from tests.strangers import as_nobody, needs_second_user
from tests.transports.saver import other_saver
from tests.transports.using import connect, send_all

Make = Callable[[str | TransportURI], Transport]

schemes = ["file", "pipe"]
both = pytest.mark.parametrize("scheme", schemes)


async def _save(transport: Transport, data: bytes = b"a guest") -> None:
    async with transport.connect() as channel:
        await send_all(channel, data)


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("second", schemes)
@pytest.mark.parametrize("first", schemes)
@pytest.mark.parametrize("way", ["", "/link", "/../{name}"])
async def test_of_two_processes_one_is_refused_until_the_other_is_gone(
    first: str, second: str, way: str, transport: Make, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    uri = f"{second}:{tmp_path}{way.format(name=tmp_path.name)}/a.img"
    with other_saver(f"{first}:{tmp_path}/a.img") as other:
        with pytest.raises(ConnectFailed, match=rf"can't write .*: process {other.pid} is saving to it"):
            await connect(transport(uri))
        await _save(transport(f"{second}:{tmp_path}/b.img"))
        other.send_signal(signal.SIGKILL)
        other.wait()
        await _save(transport(uri))
    assert _names(tmp_path) == ["a.img", "b.img", "link"]


@both
async def test_of_two_in_one_process_one_is_refused(scheme: str, transport: Make, tmp_path: Path) -> None:
    uri = f"{scheme}:{tmp_path}/a.img"
    async with transport(uri).connect() as channel:
        with pytest.raises(ConnectFailed, match="is saving to it already"):
            await connect(transport(uri))
        await send_all(channel, b"the first")
    assert (tmp_path / "a.img").read_bytes() == b"the first"
    await _save(transport(uri))


@both
@pytest.mark.parametrize("named", [False, True])
async def test_a_file_that_has_appeared_is_not_replaced(
    scheme: str, named: bool, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named:
        _refuse_unnamed(monkeypatch)
    async with transport(f"{scheme}:{tmp_path}/a.img").connect() as channel:
        await send_all(channel, b"a guest")
        (tmp_path / "a.img").write_text("somebody else's")
        with pytest.raises(ChannelBroken, match="a file has appeared under that name since this save began"):
            await channel.aclose()
    assert (tmp_path / "a.img").read_text() == "somebody else's"
    assert _names(tmp_path) == ["a.img"]


def _write_into(path: Path) -> None:
    with path.open("r+") as file:
        file.write("x")


def _replace_by_rename(path: Path) -> None:
    path.with_name("new").write_text("older")
    path.with_name("new").rename(path)


def _with_its_old_time(path: Path) -> None:
    was = path.stat()
    _write_into(path)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@both
@pytest.mark.parametrize(
    "change", [Path.unlink, _write_into, _replace_by_rename, _with_its_old_time], ids=lambda act: act.__name__
)
async def test_a_file_that_has_changed_is_not_replaced(
    scheme: str, change: Callable[[Path], None], transport: Make, tmp_path: Path
) -> None:
    path = tmp_path / "a.img"
    path.write_text("older")
    await trio.sleep(0.02)  # a file's times are as coarse as the kernel's ticks
    async with transport(f"{scheme}:{path}").connect() as channel:
        await send_all(channel, b"a guest")
        change(path)
        changed = path.read_text() if path.exists() else ""
        with pytest.raises(ChannelBroken, match="what is under that name has changed since this save began"):
            await channel.aclose()
    assert (path.read_text() if path.exists() else "") == changed


@both
async def test_what_may_be_replaced_can_be_said(scheme: str, transport: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    uri = f"{scheme}:{path}?replace="
    await _save(transport(f"{uri}none"), b"1")
    with pytest.raises(ConnectFailed, match="there is such a file already, and replace=none"):
        await connect(transport(f"{uri}none"))
    async with transport(f"{uri}any").connect() as channel:
        await send_all(channel, b"2")
        path.write_text("changed")
    assert path.read_text() == "2"
    await _save(transport(f"{uri}seen"), b"3")
    assert path.read_text() == "3"
    with pytest.raises(BadURI, match="replace=seen or replace=any or replace=none"):
        transport(f"{uri}all")


@both
async def test_names_as_long_as_can_be_are_saved_and_longer_ones_refused_at_once(
    scheme: str, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_unnamed(monkeypatch)
    for name in ("x" * 255, "ä" * 127, "ä" * 126 + "x"):
        await _save(transport(TransportURI(scheme, f"{tmp_path}/{name}")))
        assert _names(tmp_path) == [name]
        (tmp_path / name).unlink()
    for name in ("x" * 256, "ä" * 128):
        with pytest.raises(ConnectFailed, match="name too long"):
            await connect(transport(TransportURI(scheme, f"{tmp_path}/{name}")))


@both
async def test_a_hard_link_keeps_what_it_had(scheme: str, transport: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "a.img")
    await _save(transport(f"{scheme}:{tmp_path}/a.img"))
    assert (tmp_path / "precious").read_text() == "precious"


@both
async def test_a_killed_saver_leaves_nothing_that_the_next_one_does_not_remove(
    scheme: str, transport: Make, tmp_path: Path
) -> None:
    with other_saver(f"{scheme}:{tmp_path}/a.img", named=True) as other:
        assert len(_names(tmp_path)) == 2
    assert other.wait() == -signal.SIGKILL
    while len(_names(tmp_path)) == 2:  # a helper may still hold the partial file
        await _save(transport(f"{scheme}:{tmp_path}/a.img"))
    assert _names(tmp_path) == ["a.img"]


async def test_leftovers_of_other_names_go_when_they_are_old_and_nobodys(
    transport: Make, tmp_path: Path
) -> None:
    for name in (".old.0123abcd.partial", ".old.saving", ".young.0123abcd.partial", ".young.saving"):
        (tmp_path / name).touch()
    for name in (".not.partial", "old.0123abcd.partial", ".link.0123abcd.partial"):
        (tmp_path / name).symlink_to("nowhere")
    (tmp_path / ".full.saving").write_text("somebody's own")
    for name in _names(tmp_path):
        if "young" not in name:
            os.utime(tmp_path / name, (1, 1), follow_symlinks=False)
    with other_saver(f"file:{tmp_path}/held.img", named=True):
        held = next(name for name in _names(tmp_path) if re.match(r"\.held\..*partial", name))
        os.utime(tmp_path / held, (1, 1))
        await _save(transport(f"file:{tmp_path}/a.img"))
        left = set(_names(tmp_path))
        assert {held, ".held.img.saving", ".young.0123abcd.partial", ".young.saving"} <= left
        assert {".not.partial", "old.0123abcd.partial", ".link.0123abcd.partial", ".full.saving"} <= left
        assert not {".old.0123abcd.partial", ".old.saving"} & left
    for name in _names(tmp_path):
        (tmp_path / name).unlink()


@needs_second_user
@both
@pytest.mark.parametrize("link", ["a.img", "directory/a.img"])
async def test_another_users_link_in_a_directory_like_tmp_is_not_followed(
    scheme: str, link: str, transport: Make, open_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "victim").mkdir()
    planted = open_directory / link.split("/")[0]
    target = tmp_path / "victim" if "/" in link else tmp_path / "victim" / "a.img"
    with as_nobody(lambda: planted.symlink_to(target)):
        with pytest.raises(ConnectFailed, match="is a link of user 65534's, in a directory that everybody"):
            await connect(transport(f"{scheme}:{open_directory}/{link}"))
        assert _names(tmp_path / "victim") == []
    planted.unlink()
    planted.symlink_to(target)  # one of one's own is followed
    await _save(transport(f"{scheme}:{open_directory}/{link}"))
    assert (tmp_path / "victim" / "a.img").read_bytes() == b"a guest"


@needs_second_user
@both
async def test_another_users_file_in_a_directory_like_tmp_gets_none_of_the_guest(
    scheme: str, transport: Make, open_directory: Path
) -> None:
    def plant() -> object:
        (open_directory / "a.img").write_text("empty")
        return (open_directory / "a.img").open()

    with as_nobody(plant):
        await _save(transport(f"{scheme}:{open_directory}/a.img"))
    found = (open_directory / "a.img").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (0, 0o600)


@needs_second_user
async def test_another_users_claim_is_said_to_be_in_the_way(transport: Make, open_directory: Path) -> None:
    with as_nobody(lambda: (open_directory / ".a.img.saving").symlink_to("/root")):
        with pytest.raises(ConnectFailed, match=r"\.a\.img\.saving beside it, which user 65534 has made"):
            await connect(transport(f"file:{open_directory}/a.img"))
    (open_directory / ".a.img.saving").unlink()


@both
async def test_a_descriptor_of_a_process_is_no_name_of_a_file(
    scheme: str, transport: Make, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("w") as log:
        for path in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}", "/dev/stdout"):
            with pytest.raises(ConnectFailed, match=r"can't write .*a link of /proc.*name the file itself"):
                await connect(transport(f"{scheme}:{path}"))


def _refuse_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refusing)
