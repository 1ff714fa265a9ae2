"""Paths that a saved guest can't be written to, or that mean a descriptor: said before anything is done.

It imports little: the command line looks in here before it forks.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from pathlib import Path

from kvmmig.errors import BadURI, ConnectFailed

_NOT_FOR_FILES = ("/dev", "/proc", "/sys")
_MEMORY_ON_PURPOSE = "/dev/shm"
_LONGEST_NAME = 255  # bytes, on every file system of Linux
_MOST_LINKS = 40

_protected: set[str] = set()


def protect(directory: Path) -> None:
    """From here on, no guest is saved into that directory."""
    _protected.add(os.path.realpath(directory))


def is_protected(path: str) -> bool:
    """Whether it is in a directory that was protected."""
    real = os.path.realpath(path)
    return any(_is_in(real, directory) for directory in _protected)


def descriptor_of(path: str) -> int | None:
    """The number of this process's descriptor that a path leads to, as /dev/stdout and /dev/fd/9 do."""
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(os.path.abspath(path))
        parent = os.path.realpath(parent)
        if re.fullmatch(rf"/proc/{os.getpid()}(/task/[0-9]+)?/fd", parent):
            return int(name) if name.isdecimal() and name.isascii() else None
        try:
            path = os.path.join(parent, os.readlink(os.path.join(parent, name)))
        except OSError:  # it is no link
            return None
    return None


def check_place(path: str) -> None:
    """Raise `BadURI` for a path that no guest can be saved to, as a sentence that says what to do instead."""
    if "\0" in path:
        return  # whoever opens it says so
    if descriptor_of(path) is not None:
        raise BadURI(
            f"{path} is a descriptor of the machine's own process, and not yours; pass yours: "
            'kvmmig save NAME - writes to standard output, and a monitor\'s client has "getfd"'
        )
    real = os.path.realpath(path)
    parent, name = os.path.split(real)
    if (length := len(os.fsencode(name))) > _LONGEST_NAME:
        raise BadURI(
            f"{path}: its name has {length} bytes; a file's may have {_LONGEST_NAME}: choose a shorter one"
        )
    if is_protected(real):
        raise BadURI(f"{path} is in the directory of kvmmig's own sockets and locks; choose another place")
    try:
        mode = os.stat(real).st_mode
    except OSError:
        mode = 0
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        raise BadURI(
            f"{path} is no regular file; have the command write to it: "
            f"kvmmig save NAME - > {shlex.quote(path)}"
        )
    if any(_is_in(real, directory) for directory in _NOT_FOR_FILES) and not _is_in(real, _MEMORY_ON_PURPOSE):
        raise BadURI(
            f"{path} is not there, and in {parent} a file would be in memory, or can't be; is a device's "
            "name mistyped? Else choose a directory on a disk"
        )


def check_writable(path: str) -> None:
    """Raise `ConnectFailed` where no file can be made at ``path``; whoever makes one may still fail later."""
    if "\0" in path:
        return  # whoever opens it says so
    real = os.path.realpath(path)
    parent = os.path.dirname(real)
    try:
        if not stat.S_ISDIR(os.stat(parent).st_mode):
            number = errno.ENOTDIR
        elif os.path.isdir(real):
            number = errno.EISDIR
        elif os.statvfs(parent).f_flag & os.ST_RDONLY:
            number = errno.EROFS
        else:
            number = 0 if os.access(parent, os.W_OK | os.X_OK) else errno.EACCES
    except OSError as error:
        number = error.errno or errno.EIO
    if number:
        raise ConnectFailed(f"Could not create '{path}': {os.strerror(number)}")  # word for word as QEMU's


def _is_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + "/")
