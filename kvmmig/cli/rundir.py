"""The runtime directory: where the machines that run are found by their names.

A machine ``a`` has ``a.sock`` there (its monitor), ``a.console`` (its serial port), ``a.log`` (what it has to
say in the background), and ``a.lock``, which it holds locked as long as it lives: so a name is taken by one
machine at a time, whatever races, and the files of one that was killed are known to be nobody's.

It imports little: shell completion looks in here too.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvmmig.errors import BadConfig, KvmmigError

_LONGEST = 107  # bytes of a Unix socket's path: sockaddr_un's 108 and its final zero
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")
_SOCKET, _CONSOLE, _LOG, _LOCK = ".sock", ".console", ".log", ".lock"


class RuntimeDirectoryUnusable(KvmmigError):
    """There is no directory for the sockets of machines."""


class NameTaken(KvmmigError):
    """Another machine has this name."""


@dataclass(frozen=True, slots=True)
class Files:
    """The paths that belong to one name."""

    monitor: Path
    console: Path
    log: Path
    lock: Path


def directory() -> Path:
    """Where the runtime directory is, made or not."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "kvmmig"
    user = os.getuid()
    session = Path(f"/run/user/{user}")
    return session / "kvmmig" if session.is_dir() else Path(f"/tmp/kvmmig-{user}")


def files_of(name: str) -> Files:
    """The paths of a machine's files, there or not."""
    where = directory()
    return Files(*(where / (name + suffix) for suffix in (_SOCKET, _CONSOLE, _LOG, _LOCK)))


def names() -> list[str]:
    """The names of the machines that seem to run, sorted. It only looks at the directory."""
    with suppress(OSError):
        return sorted(
            entry.name.removesuffix(_SOCKET)
            for entry in os.scandir(directory())
            if entry.name.endswith(_SOCKET)
        )
    return []


def check_name(name: str) -> None:
    """Raise `BadConfig` for a name that can't be a machine's."""
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} can't be a machine's name; it has at most 48 letters, digits, dots, dashes and "
            "underscores, and begins with a letter or a digit"
        )


def answers(path: Path) -> bool:
    """True when somebody listens on a Unix socket. At once: it does not wait for a word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:  # so many wait there already
            return True
        except OSError:
            return False
    return True


def clean() -> None:
    """Remove the files of machines that were killed; logs stay until their name is used again."""
    with suppress(OSError):
        found = {entry.name for entry in os.scandir(directory())}
        for name in {Path(file).stem for file in found if file.endswith((_SOCKET, _CONSOLE, _LOCK))}:
            with suppress(NameTaken, RuntimeDirectoryUnusable):
                _claim(name).release()


def uptime(name: str) -> float | None:
    """Seconds since a machine took its name; None when it is not there."""
    try:
        return max(0.0, time.time() - files_of(name).lock.stat().st_mtime)
    except OSError:
        return None


class Claim:
    """A name that is this process's own until `release`, which removes its files, except a log."""

    def __init__(self, name: str, lock: int) -> None:
        self.name = name
        self.files = files_of(name)
        self._lock = lock

    def release(self) -> None:
        """Give the name back. Idempotent."""
        if self._lock < 0:
            return
        paths = [self.files.console, self.files.monitor, self.files.lock]
        with suppress(OSError):
            if self.files.log.stat().st_size == 0:
                paths.append(self.files.log)
        for path in paths:
            with suppress(OSError):
                path.unlink()
        os.close(self._lock)
        self._lock = -1


def claim(name: str) -> Claim:
    """Take a name. Raises `BadConfig`, `NameTaken`, `RuntimeDirectoryUnusable`."""
    check_name(name)
    _prepare(name)
    return _claim(name)


def claim_like(name: str) -> Claim:
    """Take this name, or the first free one of NAME-2, NAME-3, ... Raises `RuntimeDirectoryUnusable`."""
    for candidate in _candidates(name):
        _prepare(candidate)
        with suppress(NameTaken):
            return _claim(candidate)
    raise AssertionError("unreachable")


def _candidates(name: str) -> Iterator[str]:
    base = _UNFIT.sub("-", name).strip("-._")[:40] or "machine"
    yield base
    number = 1
    while True:
        number += 1
        yield f"{base}-{number}"


def _claim(name: str) -> Claim:
    files = files_of(name)
    while True:
        try:
            lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(error.strerror) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(files.lock, lock):  # its holder removed it in this moment
                os.close(lock)
                continue
            if answers(files.monitor):  # a monitor that was not started by `kvmmig run`
                raise BlockingIOError
        except BlockingIOError:
            os.close(lock)
            raise NameTaken(
                f"a machine named {name!r} runs already; choose another --name, or end that one with: "
                f"kvmmig quit {name}"
            ) from None
        for path in (files.monitor, files.console):
            with suppress(OSError):
                path.unlink()
        return Claim(name, lock)


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _prepare(name: str) -> None:
    """The directory is there, is this user's alone, and the name fits in."""
    where = directory()
    try:
        where.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(where)
    except OSError as error:
        raise _unusable(error.strerror) from error
    if not stat.S_ISDIR(found.st_mode):
        raise _unusable("it is no directory")
    if found.st_uid != os.getuid():
        raise _unusable(f"it belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        raise _unusable("other users can get at it; it must have mode 0700")
    longest = os.fsencode(files_of(name).console)
    if len(longest) > _LONGEST:
        raise _unusable(
            f"{len(longest)} bytes are too many for a Unix socket's path, which has at most {_LONGEST}"
        )


def _unusable(why: str | None) -> RuntimeDirectoryUnusable:
    return RuntimeDirectoryUnusable(
        f"the runtime directory {directory()} can't be used: {why}; set XDG_RUNTIME_DIR to a short path that "
        "is yours alone"
    )
