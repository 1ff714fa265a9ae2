"""Names in directories that other users can write to, such as ``/tmp``.

The kernel has rules for such directories, and switches for turning them off (``fs.protected_symlinks``,
``protected_hardlinks``, ``protected_regular``, ``protected_fifos``). Here they hold always: a path is walked
step by step, each from the descriptor of the directory before it, so that what was checked is what is used.
Everything here may block for as long as a disk pleases.
"""

from __future__ import annotations

import errno
import os
import stat

_MOST_LINKS = 40  # as the kernel's MAXSYMLINKS
_WALK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafePath(Exception):
    """What another user could have prepared. Its text is the end of a sentence."""


class ProcPath(UnsafePath):
    """A path through a link of ``/proc``, which means something else to each process."""


def open_parent(path: str) -> tuple[int, str]:
    """The directory that ``path`` leads to, open with O_PATH, and the name in it, which is no symbolic link.

    Links are followed, but none that another user has made in a directory like ``/tmp``, and none of
    ``/proc``. The caller closes the directory. Raises `UnsafePath` and `OSError`, whose ``filename`` is the
    step that failed.
    """
    absolute = path if path.startswith("/") else f"{os.getcwd()}/{path}"
    steps = [step for step in reversed(absolute.split("/")) if step and step != "."]
    where, links, walked = os.open("/", _WALK | os.O_DIRECTORY), 0, ""
    try:
        while steps:
            step = steps.pop()
            text = _link_text(where, step)
            if text is not None:
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                steps.extend(part for part in reversed(text.split("/")) if part and part != ".")
                if text.startswith("/"):
                    where, walked = _replace(where, os.open("/", _WALK | os.O_DIRECTORY)), ""
            elif not steps and step != "..":
                return where, step
            else:
                walked = f"{walked}/{step}"
                try:
                    further = os.open(step, _WALK | os.O_DIRECTORY, dir_fd=where)
                except OSError as error:
                    error.filename = walked
                    raise
                where = _replace(where, further)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    except BaseException:
        os.close(where)
        raise


def open_to_append(path: str, flags: int) -> int:
    """Open a file to append to, made with mode 0600 where there is none; or a named pipe or a terminal.

    ``flags`` are for what is not regular. A link of ``/proc`` is followed: whose descriptors these are, is
    this process. Nothing is written through a hard link, or to what another user has put into a directory
    like ``/tmp``. Raises `UnsafePath` and `OSError`.
    """
    try:
        where, name = open_parent(path)
    except ProcPath:
        return os.open(path, flags)
    try:
        while True:
            try:
                found = os.stat(name, dir_fd=where, follow_symlinks=False)
            except FileNotFoundError:
                make = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
                try:
                    return os.open(name, make, 0o600, dir_fd=where)
                except FileExistsError:  # somebody was faster
                    continue
            _refuse_foreign(where, found)
            regular = stat.S_ISREG(found.st_mode)
            kept = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC if regular else flags
            fd = os.open(name, kept | os.O_NOFOLLOW, dir_fd=where)
            if os.path.samestat(found, os.fstat(fd)):
                return fd
            os.close(fd)  # it was replaced in this moment
    finally:
        os.close(where)


def others_can_write(directory: os.stat_result) -> bool:
    """Whether it is like ``/tmp``: everybody may make files in it, and remove only their own."""
    return bool(directory.st_mode & stat.S_ISVTX and directory.st_mode & stat.S_IWOTH)


def _link_text(where: int, step: str) -> str | None:
    """Where a symbolic link leads; None where it is none, or nothing at all."""
    try:
        found = os.stat(step, dir_fd=where, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISLNK(found.st_mode):
        return None
    directory = os.fstat(where)
    if others_can_write(directory) and found.st_uid not in (os.geteuid(), directory.st_uid):
        raise UnsafePath(
            f"{step} in it is a link of user {found.st_uid}'s, in a directory that everybody can write to"
        )
    if found.st_dev == os.stat("/proc").st_dev:
        raise ProcPath(
            "it leads through a link of /proc, another thing to each process; name the file itself"
        )
    return os.readlink(step, dir_fd=where)


def _refuse_foreign(where: int, found: os.stat_result) -> None:
    directory = os.fstat(where)
    kinds = stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)
    if kinds and others_can_write(directory) and found.st_uid not in (os.geteuid(), directory.st_uid):
        raise UnsafePath(f"user {found.st_uid} has put it into a directory that everybody can write to")
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise UnsafePath(f"it has {found.st_nlink} names (hard links), perhaps one of somebody else's")


def _replace(old: int, new: int) -> int:
    os.close(old)
    return new
