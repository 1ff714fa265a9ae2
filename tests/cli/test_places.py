"""A path means the user's, ``-`` is standard output and input, and what can't be a place is said before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.cli import rundir
from kvmmig.qmp.client import QMPClient
from kvmmig.qmp.messages import QMPError

from .conftest import PATIENCE

pytestmark = pytest.mark.kvm

SMALL = ("dirtier", "--memory", "16MiB", "--set", "hot=1MiB", "--name", "a")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line as a person types it; ``$K`` is kvmmig."""
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env={**os.environ, "K": f"{sys.executable} -m kvmmig"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def state(command: Command, name: str) -> str:
    told: str = json.loads(command("status", name, "--json")[1])["status"]
    return told


@pytest.mark.parametrize(
    ("save", "restore"),
    [
        ("$K save a - > x.img", "$K restore - < x.img"),
        ("$K save a - | gzip -1 > x.gz", "gunzip < x.gz | $K restore -"),
        ("$K save a /dev/stdout > x.img", "cat x.img | $K restore /dev/stdin"),
        ("$K save a /dev/fd/9 9> x.img", "$K restore /proc/self/fd/8 8< x.img"),
        ("mkfifo f; cat f > x.img & $K save a f; wait", "$K restore <(cat x.img)"),
        ("$K save a >(cat > x.img); wait $!", "$K restore x.img"),
        ("$K save a sub/../x.img", "$K restore ./x.img"),
        ("$K migrate a file:x.img", "$K restore x.img"),
    ],
)
def test_a_guest_is_saved_to_and_restored_from_what_the_user_means(
    background: Background, command: Command, tmp_path: Path, save: str, restore: str
) -> None:
    (tmp_path / "sub").mkdir()
    background("run", *SMALL)
    saved = shell(save, tmp_path)
    assert saved.returncode == 0, saved.stderr
    assert "\0" not in saved.stdout
    if restore.endswith("x.img"):  # and so it has the figures
        assert "worst stall" in saved.stdout + saved.stderr
    restored = shell(f"{restore} --name b --detach", tmp_path)
    assert restored.returncode == 0, restored.stderr
    assert state(command, "b") == "running"


def test_what_can_not_be_written_to_the_end_leaves_the_guest_here(
    background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    for line in (
        "(ulimit -f 64; trap '' XFSZ; $K save a - > x.img)",
        "$K save a - | head -c 100 > x.img; false",
    ):
        assert shell(line, tmp_path).returncode == 1
        assert state(command, "a") == "running"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/dev/sdzz9", "is a device's name mistyped"),
        ("/dev/mapper/absent", "is a device's name mistyped"),
        ("/proc/absent", "choose a directory on a disk"),
        ("/dev/null", "is no regular file"),
        ("/dev/fd/99", "was started without a descriptor 99"),
        ("ü" * 128, "choose a shorter one"),
        ("RUN/kvmmig/a.lock", "kvmmig's own sockets and locks"),
        ("RUN/kvmmig/b.img", "kvmmig's own sockets and locks"),
    ],
)
def test_a_path_that_is_no_place_is_refused_before_anything_is_sent(
    background: Background, command: Command, path: str, sentence: str
) -> None:
    background("run", *SMALL)
    path = path.replace("RUN", os.environ["XDG_RUNTIME_DIR"])
    before = sorted(os.listdir(rundir.directory()))
    status, _, error = command("save", "a", path)
    assert status == 2
    assert sentence in error
    assert not path.startswith("/dev/s") or not os.path.exists(path)
    assert sorted(os.listdir(rundir.directory())) == before
    assert json.loads(command("status", "a", "--json")[1])["migration"] == {}


def test_nor_may_a_monitors_client_mean_the_machines_own(background: Background, command: Command) -> None:
    background("run", *SMALL)

    async def try_all() -> None:
        async with QMPClient.connect(f"unix:{rundir.files_of('a').monitor}") as client:
            for path in ("/dev/stdout", "/dev/fd/5", "/proc/self/fd/1", str(rundir.files_of("a").log)):
                for scheme in ("file", "pipe", "throttle+file"):
                    with pytest.raises(QMPError, match=r"own process|own sockets|wrapper"):
                        await client.execute("migrate", {"uri": f"{scheme}:{path}"})

    trio.run(try_all)
    assert state(command, "a") == "running"
