"""What the operating system's errors and kinds of files are called in a sentence."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_WORDS = {
    errno.ENOENT: "there is no such file or directory",
    errno.EACCES: "you have no permission",
    errno.EPERM: "you have no permission",
    errno.EROFS: "its file system is mounted read-only",
    errno.ENOSPC: "no space is left on its file system",
    errno.EDQUOT: "your disk quota is used up",
    errno.EIO: "the disk reports an I/O error",
    errno.EFBIG: "it grew beyond the largest file that is allowed here",
    errno.ELOOP: "its symbolic links go round in a circle",
}


def why(error: Exception, words: Mapping[int, str] | None = None) -> str:
    """What went wrong, as the end of a sentence. ``words`` go before those that fit any file."""
    if not isinstance(error, OSError):
        return str(error)
    number = error.errno or 0
    said, plain = error.strerror or str(error), os.strerror(number)
    # Some libraries put more around the system's own words.
    return (words or {}).get(number) or _WORDS.get(number) or (plain if plain in said else said)


def kind(mode: int) -> str:
    """What a file of this ``st_mode`` is: "a directory"."""
    return _KINDS.get(stat.S_IFMT(mode), "not a file")
