"""Who may save to a name, and what killed saves have left: the hidden files beside a saved guest.

``.NAME.saving``, empty, is locked by the process that saves to NAME. The lock ends with the process, however
that ends. ``.NAME.XXXXXXXX.partial`` is a save that has no other name yet, locked by whoever writes it. So
what nobody has locked is nobody's. Everything here may block for as long as the disk pleases.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from pathlib import Path

from kvmmig.errors import ConnectFailed

_LONGEST = 255  # bytes of a name: NAME_MAX of <linux/limits.h>
_LEFT = re.compile(r"\..+\.(?:[0-9a-f]{8}\.partial|saving)", re.DOTALL)
_OLD = 60.0  # seconds without a write: where locks are not shared between hosts, only time tells
_PATIENCE = 0.5  # seconds for somebody who has just been cancelled, or killed
_AGAIN = 0.01
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def partial_name(name: str) -> str:
    """A new hidden name beside ``name``, for what is not whole yet."""
    return f"{_stem(name)}.{secrets.token_hex(4)}.partial"


class SaveClaim:
    """A name in a directory that is this process's to save to, until `release` or its end."""

    def __init__(self, directory_fd: int, name: str, path: str) -> None:
        """``directory_fd`` stays the caller's; ``path`` is for errors.

        Raises `ConnectFailed` where another process has the name, and `OSError`.
        """
        self._file = f"{_stem(name)}.saving"
        #: False where the file system has no locks: then nobody is kept away.
        self.holds = True
        self._releasing = threading.Lock()
        while True:
            self._fd = self._open(directory_fd, path)
            try:
                self._lock(path)
                if not self.holds or _is_still(directory_fd, self._file, self._fd):
                    self._directory_fd = os.dup(directory_fd)
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)  # its holder has removed it in this moment

    def release(self) -> None:
        """Give the name back. Idempotent, from any thread, never raises."""
        with self._releasing:
            if self._fd < 0:
                return
            with contextlib.suppress(OSError):
                os.unlink(self._file, dir_fd=self._directory_fd)
            os.close(self._fd)
            os.close(self._directory_fd)
            self._fd = self._directory_fd = -1

    def _open(self, where: int, path: str) -> int:
        try:
            return os.open(self._file, _OPEN | os.O_CREAT, 0o600, dir_fd=where)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                owner = os.stat(self._file, dir_fd=where, follow_symlinks=False).st_uid
                raise ConnectFailed(
                    f"can't write {path}: {self._file} beside it, which user {owner} has made, is in the way"
                ) from error
            raise

    def _lock(self, path: str) -> None:
        until = time.monotonic() + _PATIENCE
        try:
            while True:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise
                time.sleep(_AGAIN)
        except BlockingIOError as error:
            raise ConnectFailed(
                f"can't write {path}: {_holder(self._fd)} is saving to it already; wait until it has, or "
                "choose another name"
            ) from error
        except OSError:
            self.holds = False


def lock_partial(fd: int) -> None:
    """Say that somebody writes it, until its last descriptor is closed, a helper's included."""
    with contextlib.suppress(OSError):  # a file system without locks: then it is kept for its age
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(directory_fd: int, name: str) -> None:
    """Remove this user's files of killed saves: of ``name``, which the caller has claimed, at once; of others
    when a minute old. What somebody has locked stays. Never raises.
    """
    own = _stem(name)
    with contextlib.suppress(OSError):
        for file in os.listdir(directory_fd):
            if _LEFT.fullmatch(file) and file != f"{own}.saving":
                with contextlib.suppress(OSError):
                    _remove(directory_fd, file, 0.0 if file.startswith(f"{own}.") else _OLD)


def _remove(directory_fd: int, file: str, old: float) -> None:
    fd = os.open(file, _OPEN, dir_fd=directory_fd)
    try:
        found = os.fstat(fd)
        mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        claims_nothing = file.endswith(".partial") or found.st_size == 0
        if mine and claims_nothing and time.time() - found.st_mtime >= old:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(directory_fd, file, fd):
                os.unlink(file, dir_fd=directory_fd)
    finally:
        os.close(fd)


def _stem(name: str) -> str:
    """``.NAME``, or its beginning and a digest where the whole would leave no room for an ending."""
    room = _LONGEST - len("..XXXXXXXX.partial")
    encoded = os.fsencode(name)
    if len(encoded) > room:
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        name = f"{encoded[: room - 17].decode(errors='ignore')}~{digest}"
    return f".{name}"


def _is_still(directory_fd: int, file: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(file, dir_fd=directory_fd, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    """Which process has it locked, as far as the kernel tells: proc_locks(5)."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, file, *_ = line.replace("-> ", "").split()
            if kind == "FLOCK" and file.endswith(f":{inode}"):
                return f"process {pid}"
    return "another process"
