"""The runtime directory: where the machines that run are found by their names.

A machine ``a`` has ``a.sock`` there (its monitor), ``a.console`` (its serial port), ``a.log`` (what it has to
say in the background), and ``a.lock``, which it holds locked as long as it lives: so a name is taken by one
machine at a time, whatever races, and the files of one that was killed are known to be nobody's.

Every command, also one that only looks, first opens the directory and checks that it is this user's alone.
What is in it is then found from that descriptor, and no link is followed: whoever can change the way to the
directory changes nothing about what was checked. A socket is talked to only where this user, or root, listens
on it: see docs/security.md.

It imports little: shell completion looks in here too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvmmig.errors import BadConfig, KvmmigError

_LONGEST = 107  # bytes of a Unix socket's path: sockaddr_un's 108 and its final zero
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")
_SOCKET, _CONSOLE, _LOG, _LOCK = ".sock", ".console", ".log", ".lock"
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class RuntimeDirectoryUnusable(KvmmigError):
    """There is no directory for the sockets of machines."""


class NameTaken(KvmmigError):
    """Another machine has this name."""


@dataclass(frozen=True, slots=True)
class Files:
    """The paths that belong to one name, to be shown: what opens one goes through this module."""

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
    """The names of the machines that seem to run, sorted. It only looks at the directory.

    Raises `RuntimeDirectoryUnusable`.
    """
    with suppress(FileNotFoundError), _opened() as where:
        found = (file.removesuffix(_SOCKET) for file in os.listdir(where) if file.endswith(_SOCKET))
        return sorted(name for name in found if _NAME.fullmatch(name))
    return []


def check_name(name: str) -> None:
    """Raise `BadConfig` for a name that can't be a machine's."""
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} can't be a machine's name; it has at most 48 letters, digits, dots, dashes and "
            "underscores, and begins with a letter or a digit"
        )


def connect_monitor(name: str) -> socket.socket | None:
    """A non-blocking socket to a machine's monitor; None where so many wait already that it has to wait too.

    Raises `OSError` where nobody listens, and `RuntimeDirectoryUnusable`, also where a stranger does.
    """
    return _connect(name + _SOCKET)


def connect_console(name: str) -> socket.socket | None:
    """The same, to its serial port."""
    return _connect(name + _CONSOLE)


def answers(name: str) -> bool:
    """True when somebody listens as that machine's monitor. At once: it does not wait for a word.

    Raises `RuntimeDirectoryUnusable`.
    """
    try:
        probe = connect_monitor(name)
    except OSError:
        return False
    if probe is not None:
        probe.close()
    return True


def clean() -> None:
    """Remove the files of machines that were killed; logs stay until their name is used again.

    Raises `RuntimeDirectoryUnusable`.
    """
    with suppress(FileNotFoundError), _opened() as where:
        found = [file for file in os.listdir(where) if file.endswith((_SOCKET, _CONSOLE, _LOCK))]
        for name in {Path(file).stem for file in found}:
            with suppress(NameTaken):
                _claim(where, name).release()


def uptime(name: str) -> float | None:
    """Seconds since a machine took its name; None when it is not there. Raises `RuntimeDirectoryUnusable`."""
    with suppress(OSError), _opened() as where:
        return max(0.0, time.time() - _stat(where, name + _LOCK).st_mtime)
    return None


def wait_for_end(name: str) -> None:
    """Block until a machine has given its name back, or was killed. Raises `RuntimeDirectoryUnusable`."""
    with suppress(FileNotFoundError):
        lock = open_lock(name)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
        finally:
            os.close(lock)


def open_lock(name: str) -> int:
    """The file that a machine holds locked as long as it lives; the caller closes it.

    Raises `FileNotFoundError` where there is none, other `OSError`, and `RuntimeDirectoryUnusable`.
    """
    with _opened() as where:
        return os.open(name + _LOCK, os.O_RDONLY | _FLAGS, dir_fd=where)


def has_log(name: str) -> bool:
    """Whether a machine of that name has left its last words. Raises `RuntimeDirectoryUnusable`."""
    with suppress(OSError), _opened() as where:
        return stat.S_ISREG(_stat(where, name + _LOG).st_mode)
    return False


def open_log(name: str) -> int | None:
    """A machine's log, to be read; the caller closes it. None where there is none, or none can be read.

    Raises `RuntimeDirectoryUnusable`.
    """
    with suppress(OSError), _opened() as where:
        return os.open(name + _LOG, os.O_RDONLY | _FLAGS, dir_fd=where)
    return None


def take_log(name: str) -> str:
    """Remove a machine's log and return what it said; empty where there is none, or none can be read."""
    with suppress(OSError, RuntimeDirectoryUnusable), _opened() as where:
        fd = os.open(name + _LOG, os.O_RDONLY | _FLAGS, dir_fd=where)
        os.unlink(name + _LOG, dir_fd=where)
        with open(fd, errors="replace") as file:
            return file.read()
    return ""


class Claim:
    """A name that is this process's own until `release`, which removes its files, except a log."""

    def __init__(self, name: str, directory_fd: int, lock: int) -> None:
        """Takes over both descriptors."""
        self.name = name
        self.files = files_of(name)
        self._directory = directory_fd
        self._lock = lock

    @property
    def monitor(self) -> str:
        """Where to bind the monitor's socket: a path that leads to the directory that was checked."""
        return f"/proc/self/fd/{self._directory}/{self.name}{_SOCKET}"

    @property
    def console(self) -> str:
        """The same for the serial port's."""
        return f"/proc/self/fd/{self._directory}/{self.name}{_CONSOLE}"

    def open_log(self) -> int:
        """A new, empty log, to be appended to; the caller closes it. Raises `OSError`."""
        with suppress(FileNotFoundError):  # whoever reads the older one goes on reading that
            os.unlink(self.name + _LOG, dir_fd=self._directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        return os.open(self.name + _LOG, flags, 0o600, dir_fd=self._directory)

    def release(self) -> None:
        """Give the name back. Idempotent."""
        if self._lock < 0:
            return
        suffixes = [_CONSOLE, _SOCKET, _LOCK]
        with suppress(OSError):
            if _stat(self._directory, self.name + _LOG).st_size == 0:
                suffixes.append(_LOG)
        for suffix in suffixes:
            with suppress(OSError):
                os.unlink(self.name + suffix, dir_fd=self._directory)
        os.close(self._lock)
        os.close(self._directory)
        self._lock = self._directory = -1


def claim(name: str) -> Claim:
    """Take a name. Raises `BadConfig`, `NameTaken`, `RuntimeDirectoryUnusable`."""
    check_name(name)
    with _made() as where:
        _check_length(name)
        return _claim(where, name)


def claim_like(name: str) -> Claim:
    """Take this name, or the first free one of NAME-2, NAME-3, ... Raises `RuntimeDirectoryUnusable`."""
    with _made() as where:
        for candidate in _candidates(name):
            _check_length(candidate)
            with suppress(NameTaken):
                return _claim(where, candidate)
    raise AssertionError("unreachable")


def _candidates(name: str) -> Iterator[str]:
    base = _UNFIT.sub("-", name).strip("-._")[:40] or "machine"
    yield base
    number = 1
    while True:
        number += 1
        yield f"{base}-{number}"


def _claim(where: int, name: str) -> Claim:
    while True:
        try:
            lock = os.open(name + _LOCK, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600, dir_fd=where)
        except OSError as error:
            raise _unusable(error.strerror) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(where, name + _LOCK, lock):  # its holder removed it in this moment
                os.close(lock)
                continue
            if answers(name):  # a monitor that was not started by `kvmmig run`
                raise BlockingIOError
        except BlockingIOError:
            os.close(lock)
            raise NameTaken(
                f"a machine named {name!r} runs already; choose another --name, or end that one with: "
                f"kvmmig quit {name}"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        for suffix in (_SOCKET, _CONSOLE):
            with suppress(OSError):
                os.unlink(name + suffix, dir_fd=where)
        return Claim(name, os.dup(where), lock)


def _is_still(where: int, file: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), _stat(where, file))
    except FileNotFoundError:
        return False


def _stat(where: int, file: str) -> os.stat_result:
    return os.stat(file, dir_fd=where, follow_symlinks=False)


@contextmanager
def _opened() -> Iterator[int]:
    """The runtime directory, for the block, known to be a directory of this user's alone.

    Raises `FileNotFoundError` where there is none, and `RuntimeDirectoryUnusable`.
    """
    try:
        fd = os.open(directory(), os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        no_directory = error.errno in (errno.ENOTDIR, errno.ELOOP)
        raise _unusable("it is no directory" if no_directory else error.strerror) from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.getuid():
            raise _unusable(f"it belongs to user {found.st_uid}")
        if found.st_mode & 0o077:
            raise _unusable("other users can get at it; it must have mode 0700")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _made() -> Iterator[int]:
    """As `_opened`; made where it is not there. Raises `RuntimeDirectoryUnusable`."""
    try:
        with suppress(FileExistsError):
            os.mkdir(directory(), mode=0o700)
    except OSError as error:
        raise _unusable(error.strerror) from error
    try:
        with _opened() as where:
            yield where
    except FileNotFoundError as error:
        raise _unusable(error.strerror) from error


def _connect(file: str) -> socket.socket | None:
    from kvmmig.transport.toolkit import unixsockets  # not for completion: it brings trio along

    with _opened() as where:
        # What is connected to is the file that was looked at, whatever its name leads to meanwhile.
        fd = os.open(file, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=where)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it is no socket", file)
        connected = unixsockets.try_connect(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    if connected is None:
        return None
    user = unixsockets.peer_user(connected)
    if user not in (0, os.getuid()):
        connected.close()
        raise _unusable(f"user {user} listens on {file} in it")
    return connected


def _check_length(name: str) -> None:
    """Others, such as a QMP client, use the sockets' whole paths."""
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
