"""A saved guest's file: it appears under its name only when it is whole and durable.

Until then it has no name at all (``O_TMPFILE``), so that not even a ``kill -9`` leaves half of it behind; a
file system that can't do that gets a hidden ``.NAME.XXXXXXXX.partial`` beside it. Every function here may
block for as long as the disk pleases, and is for threads; only `SaveFile.give_up` is for the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from typing import Self

from kvmmig.errors import ConnectFailed
from kvmmig.transport.toolkit.words import kind, why
from kvmmig.transport.toolkit.workers import attempt

_PRIVATE = 0o600  # a guest's memory holds its secrets


class SaveFile:
    """A file being written, and later perhaps published. Made by `create`; closed by its owner's `close`."""

    def __init__(self, path: str, directory_fd: int, name: str) -> None:
        self.path = path
        self.fd = -1
        #: Whether `fd` is open with O_DIRECT.
        self.direct = False
        self.notices: tuple[str, ...] = ()
        self._directory_fd = directory_fd
        self._name = name
        self._temporary = ""  # the name that it has meanwhile, if any
        self._older_fd = -1
        self._lock = threading.Lock()
        self._given_up = False
        self._committing = False

    @classmethod
    def create(cls, path: str, *, direct: bool) -> Self:
        """Open a new file that may become ``path``, whose old file is untouched. Raises `ConnectFailed`.

        Symbolic links are followed first. ``direct`` asks for O_DIRECT; where the file system refuses it
        the file is written through the page cache, and `notices` says so.
        """
        real = os.path.realpath(path)
        directory, name = os.path.split(real)
        try:
            with contextlib.suppress(FileNotFoundError):
                _refuse_special(path, os.stat(real).st_mode, "write")
            try:
                directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError as error:
                raise ConnectFailed(
                    f"can't write {path}: there is no directory {directory}; make it first"
                ) from error
            file = cls(path, directory_fd, name)
            try:
                file._open(directory, direct)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise ConnectFailed(f"can't write {path}: {why(error)}") from error
        return file

    def publish(self) -> bool:
        """Make it durable and give it its name, in place of an older file. Raises `OSError`.

        Returns False, with nothing published, if `give_up` was first.
        """
        os.fsync(self.fd)
        if not self._temporary:
            temporary = self._new_name()
            os.link(f"/proc/self/fd/{self.fd}", temporary, dst_dir_fd=self._directory_fd)
            self._temporary = temporary
        with self._lock:
            self._committing = not self._given_up
        if not self._committing:
            self._unlink()
            return False
        # Freeing a large file takes seconds. Held open, the older one is freed by `close`, not by the rename.
        with contextlib.suppress(FileNotFoundError):
            self._older_fd = os.open(self._name, os.O_PATH, dir_fd=self._directory_fd)
        try:
            os.rename(
                self._temporary, self._name, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd
            )
        except OSError:
            self._unlink()
            raise
        self._temporary = ""
        os.fsync(self._directory_fd)
        return True

    def give_up(self) -> None:
        """It shall never be published. Does not wait for the disk; never raises.

        Too late once `publish` has begun to rename: the file that appears is whole, and the older one gone.
        """
        with self._lock:
            self._given_up = True
            if self._committing or not self._temporary:
                return
        attempt(self._unlink, f"unlink partial {self.path}")

    def close(self) -> None:
        """Close the file descriptors, and so remove what was not published. Idempotent, never raises."""
        if self._temporary:
            self._unlink()
        for fd in (self.fd, self._directory_fd, self._older_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.fd = self._directory_fd = self._older_fd = -1

    def _open(self, directory: str, direct: bool) -> None:
        if direct:
            try:
                self.fd = self._open_plain(directory, os.O_WRONLY | os.O_DIRECT)
                self.direct = True
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._unlink()  # some file systems make the file and then refuse the flag
            self.notices = (_no_direct(self.path),)
        self.fd = self._open_plain(directory, os.O_WRONLY)

    def _open_plain(self, directory: str, flags: int) -> int:
        try:
            return os.open(directory, flags | os.O_TMPFILE, _PRIVATE)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
        self._temporary = self._new_name()
        return os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, _PRIVATE, dir_fd=self._directory_fd)

    def _new_name(self) -> str:
        return f".{self._name[:200]}.{secrets.token_hex(4)}.partial"

    def _unlink(self) -> None:
        temporary, self._temporary = self._temporary, ""
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory_fd)


class SavedFile:
    """A file opened for reading: ``fd``, ``size`` in bytes, and whether it is ``direct``."""

    def __init__(self, path: str, *, direct: bool) -> None:
        """Raises `ConnectFailed` for a file that is not there, is not regular, or can't be opened."""
        self.path = path
        self.direct = direct
        self.notices: tuple[str, ...] = ()
        flags = os.O_RDONLY | os.O_NONBLOCK  # without which opening a named pipe waits for its writer
        try:
            _refuse_special(path, os.stat(path).st_mode, "read")
            try:
                self.fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                self.fd = os.open(path, flags)
                self.direct = False
                self.notices = (_no_direct(path),)
            self.size = os.fstat(self.fd).st_size
        except OSError as error:
            raise ConnectFailed(f"can't read {path}: {why(error)}") from error

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _refuse_special(path: str, mode: int, verb: str) -> None:
    if not stat.S_ISREG(mode):
        raise ConnectFailed(f"can't {verb} {path}: it is {kind(mode)}; name a regular file")


def _no_direct(path: str) -> str:
    return f"the file system of {path} refuses O_DIRECT; going through the page cache instead"
