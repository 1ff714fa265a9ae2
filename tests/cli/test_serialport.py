"""What ``--serial`` opens, and what another user may have put there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.cli.serialport import open_serial
from kvmmig.errors import MachineError
from tests.strangers import as_nobody, needs_second_user


async def write(path: Path | str) -> None:
    async with open_serial(str(path), forced_exit=ForcedExit()) as port:
        port.output.serial(b"a secret")


async def test_a_new_log_is_its_users_alone(tmp_path: Path) -> None:
    await write(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "a secret"
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


async def test_nothing_is_written_through_a_hard_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "log")
    with pytest.raises(MachineError, match=r"--serial .*/log: it can't be opened .*it has 2 names"):
        await write(tmp_path / "log")
    assert (tmp_path / "precious").read_text() == "precious"


async def test_a_link_of_ones_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("real")
    await write(tmp_path / "log")
    assert (tmp_path / "real").read_text() == "a secret"


async def test_a_descriptor_of_this_process_can_be_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        await write(f"/dev/fd/{log.fileno()}")
    assert (tmp_path / "log").read_text() == "a secret"


def _link_to(victim: Path) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(victim)


@needs_second_user
@pytest.mark.parametrize(
    ("plant", "sentence"),
    [
        (_link_to(Path("/root/victim")), "log in it is a link of user 65534's"),
        (_link_to(Path("/dev/fd/2")), "log in it is a link of user 65534's"),
        (os.mkfifo, "user 65534 has put it into a directory that everybody can write to"),
        (Path.touch, "user 65534 has put it into a directory that everybody can write to"),
    ],
)
async def test_what_another_user_has_put_into_a_directory_like_tmp_is_refused(
    plant: Callable[[Path], object], sentence: str, open_directory: Path
) -> None:
    with (
        as_nobody(lambda: plant(open_directory / "log")),
        pytest.raises(MachineError, match=sentence),
    ):
        await write(open_directory / "log")


@needs_second_user
async def test_what_is_ones_own_there_is_used(open_directory: Path) -> None:
    (open_directory / "log").touch()
    await write(open_directory / "log")
    assert (open_directory / "log").read_text() == "a secret"
