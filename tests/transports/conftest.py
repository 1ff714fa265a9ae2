"""What the tests of all transports share; each of them must leave nothing behind."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmmig.testing import Nonconformance, leftovers
from kvmmig.testing._ends import NotApplicable
from kvmmig.transport import Transport, TransportURI, transport_for


@pytest.fixture
def transport() -> Callable[[str | TransportURI], Transport]:
    return transport_for


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """An executable shell script with this body."""

    def make(body: str) -> str:
        path = tmp_path / "helper.sh"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", where], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"can't mount a small tmpfs: {mounted.stderr.strip()}")
    yield where
    # A file that a thread still holds open keeps it busy for a moment.
    _wait_for(lambda: subprocess.run(["umount", where], capture_output=True).returncode == 0, "umount fails")


@pytest.fixture
def everything_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that looks at nothing, because there is no such thing here, fails instead of passing."""

    def refuse(self: NotApplicable, why: str) -> None:
        raise Nonconformance(f"the check does not apply, and should not be run: {why}")

    monkeypatch.setattr(NotApplicable, "__init__", refuse)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No thread of a channel, child process, file descriptor, partial file or claim outlives a test.

    They may end a moment after `abort`, which waits for nothing.
    """
    before = _left()
    yield
    _wait_for(lambda: not _left() - before, "left behind", lambda: _left() - before)
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".partial", ".saving")]


def _wait_for(done: Callable[[], bool], what: str, left: Callable[[], object] = lambda: "") -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, f"{what} {left()}"
        time.sleep(0.01)


def _left() -> set[str]:
    return leftovers() | _threads()


def _threads() -> set[str]:
    ours = ("write ", "read ", "pipe of ", "end of ", "unlink ")
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(ours)}
