"""A saved guest's file: it appears under its name only when it is whole and durable.

Until then it has no name at all (``O_TMPFILE``), so that not even a ``kill -9`` leaves half of it behind; a
file system that can't do that gets a hidden ``.NAME.XXXXXXXX.partial`` beside it. The name is claimed at the
beginning, so that of two savers one is refused while its guest runs on. Every function here may
block for as long as the disk pleases, and is for threads; only `SaveFile.give_up` is for the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from enum import StrEnum
from typing import Self

from kvmmig.errors import ConnectFailed
from kvmmig.transport.contract import Option
from kvmmig.transport.toolkit.paths import UnsafePath, open_parent
from kvmmig.transport.toolkit.saveclaim import SaveClaim, lock_partial, partial_name, remove_leftovers
from kvmmig.transport.toolkit.words import kind, why
from kvmmig.transport.toolkit.workers import attempt


class Replace(StrEnum):
    """Which older file a save may replace."""

    SEEN = "seen"  # the one that was there at the beginning, if it is as it was then
    ANY = "any"  # also one that has appeared or changed since
    NONE = "none"


#: The option by which a transport lets its user say so: ``Replace(self.option("replace"))``.
REPLACE_OPTION = Option(
    "replace",
    "which older file: the one that was there at the beginning, any, or none",
    Replace.SEEN,
    tuple(Replace),
)

_PRIVATE = 0o600  # a guest's memory holds its secrets
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class Replaced(Exception):
    """Something has been put under the name meanwhile. Its text is the end of a sentence."""


class SaveFile:
    """A file being written, and later perhaps published. Made by `create`; closed by its owner's `close`."""

    def __init__(self, path: str, directory_fd: int, name: str, replace: Replace) -> None:
        """Takes over ``directory_fd``."""
        self.path = path
        self.fd = -1
        #: Whether `fd` is open with O_DIRECT.
        self.direct = False
        self.notices: tuple[str, ...] = ()
        self._directory_fd = directory_fd
        self._name = name
        self._replace = replace
        self._claim: SaveClaim | None = None
        self._seen: tuple[int, ...] | None = None
        self._temporary = ""  # the name that it has meanwhile, if any
        self._older_fd = -1
        self._lock = threading.Lock()
        self._given_up = False
        self._committing = False

    @classmethod
    def create(cls, path: str, *, direct: bool, replace: Replace = Replace.SEEN) -> Self:
        """Open a new file that may become ``path``, whose old file is untouched. Raises `ConnectFailed`.

        Symbolic links are followed first, but none that another user has made in a directory like ``/tmp``.
        ``direct`` asks for O_DIRECT; where the file system refuses it the file is written through the page
        cache, and `notices` says so. What killed saves have left beside it is removed.
        """
        try:
            directory_fd, name = _open_directory(path)
            file = cls(path, directory_fd, name, replace)
            try:
                file._take_name()
                file._open(direct)
            except BaseException:
                file.close()
                raise
        except (OSError, UnsafePath) as error:
            raise ConnectFailed(f"can't write {path}: {why(error)}") from error
        return file

    def publish(self) -> bool:
        """Make it durable and give it its name, in place of an older file.

        Raises `Replaced` where that is not the one that may be replaced, and `OSError`. Returns False, with
        nothing published, if `give_up` was first.
        """
        os.fsync(self.fd)
        with self._lock:
            self._committing = not self._given_up
        try:
            if not self._committing:
                return False
            if self._replace is Replace.ANY or self._seen is not None:
                self._put_in_place_of_older()
            else:
                self._put_where_nothing_is()
            os.fsync(self._directory_fd)
            return True
        finally:
            self._unlink()
            if self._claim is not None:
                self._claim.release()

    def give_up(self) -> None:
        """It shall never be published. Does not wait for the disk; never raises.

        Too late once `publish` has begun to rename: the file that appears is whole, and the older one gone.
        """
        with self._lock:
            self._given_up = True
            if self._committing:
                return
        attempt(self._forget, f"unlink partial {self.path}")

    def close(self) -> None:
        """Close the file descriptors, and so remove what was not published. Idempotent, never raises."""
        self._forget()
        for fd in (self.fd, self._directory_fd, self._older_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.fd = self._directory_fd = self._older_fd = -1

    def _take_name(self) -> None:
        """Raises `ConnectFailed` where it can't be, and `OSError`."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._name, dir_fd=self._directory_fd, follow_symlinks=False)
            _refuse_special(self.path, found.st_mode, "write")
        self._claim = SaveClaim(self._directory_fd, self._name, self.path)
        remove_leftovers(self._directory_fd, self._name)
        self._seen = self._look()
        if not self._claim.holds:
            self.notices = (
                f"the file system of {self.path} has no locks; see to it that nobody else saves to that name",
            )
        if self._replace is Replace.NONE and self._seen is not None:
            raise ConnectFailed(f"can't write {self.path}: there is such a file already, and replace=none")

    def _look(self) -> tuple[int, ...] | None:
        """What tells whether the file under the name is another one, or was written to; None for no file."""
        try:
            found = os.stat(self._name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _put_where_nothing_is(self) -> None:
        """In one step, which fails where something has appeared."""
        try:
            if self._temporary:
                where = self._directory_fd
                os.link(
                    self._temporary, self._name, src_dir_fd=where, dst_dir_fd=where, follow_symlinks=False
                )
            else:
                self._link_to(self._name)
        except FileExistsError as error:
            raise self._replaced("a file has appeared under that name") from error
        except OSError as error:
            if not self._temporary or error.errno not in _NO_LINKS:
                raise
            self._put_in_place_of_older()

    def _put_in_place_of_older(self) -> None:
        if not self._temporary:
            temporary = partial_name(self._name)
            self._link_to(temporary)
            self._temporary = temporary
        # Freeing a large file takes seconds. Held open, the older one is freed by `close`, not by the rename.
        with contextlib.suppress(FileNotFoundError):
            self._older_fd = os.open(self._name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._directory_fd)
        if self._replace is not Replace.ANY and self._look() != self._seen:
            raise self._replaced("what is under that name has changed")
        os.rename(self._temporary, self._name, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        self._temporary = ""

    def _replaced(self, what: str) -> Replaced:
        return Replaced(
            f"{what} since this save began, and stays; save again, or with replace=any, to replace it"
        )

    def _link_to(self, name: str) -> None:
        os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=self._directory_fd)

    def _open(self, direct: bool) -> None:
        if direct:
            try:
                self.fd = self._open_plain(os.O_WRONLY | os.O_DIRECT)
                self.direct = True
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._unlink()  # some file systems make the file and then refuse the flag
            self.notices = (*self.notices, _no_direct(self.path))
        self.fd = self._open_plain(os.O_WRONLY)

    def _open_plain(self, flags: int) -> int:
        where = self._directory_fd
        try:
            fd = os.open(".", flags | os.O_TMPFILE, _PRIVATE, dir_fd=where)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            self._temporary = partial_name(self._name)
            fd = os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, _PRIVATE, dir_fd=where)
        lock_partial(fd)
        return fd

    def _forget(self) -> None:
        self._unlink()
        if self._claim is not None:
            self._claim.release()

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


def _open_directory(path: str) -> tuple[int, str]:
    try:
        parent, name = open_parent(path)
    except FileNotFoundError as error:
        raise ConnectFailed(
            f"can't write {path}: there is no directory {error.filename}; make it first"
        ) from error
    except IsADirectoryError as error:
        raise ConnectFailed(f"can't write {path}: it is a directory; name a regular file") from error
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent), name
    finally:
        os.close(parent)


def _refuse_special(path: str, mode: int, verb: str) -> None:
    if not stat.S_ISREG(mode):
        raise ConnectFailed(f"can't {verb} {path}: it is {kind(mode)}; name a regular file")


def _no_direct(path: str) -> str:
    return f"the file system of {path} refuses O_DIRECT; going through the page cache instead"
