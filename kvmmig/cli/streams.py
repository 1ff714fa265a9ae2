"""``save NAME -`` and ``restore -``: a guest through a descriptor of the command's own, whatever it is.

A pipe goes to the machine itself. To and from all else, such as ``> FILE`` or a block device, this process
copies: the machine has one end of a pipe.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import suppress

from kvmmig.errors import BadURI
from kvmmig.transport import TransportURI, descriptors
from kvmmig.transport.places import descriptor_of

_PIECE = 1 << 20  # bytes


def own_descriptor(path: str, *, writing: bool) -> int | None:
    """A descriptor of this process's own for what ``path`` means to it; None for an ordinary path.

    It is the caller's. For standard output it is taken away from there: what is said goes to standard error.
    Raises `BadURI` for what can't be written to, or read.
    """
    standard = 1 if writing else 0
    number = standard if path == "-" else descriptor_of(path)
    try:
        if number is None:
            if not _is_fifo(path):
                return None
            fd = os.open(path, (os.O_WRONLY if writing else os.O_RDONLY) | os.O_CLOEXEC)
        else:
            if number > 2:
                descriptors.check_inherited(number)
            fd = os.dup(number)
    except OSError as error:
        raise BadURI(f"{path} can't be opened: {os.strerror(error.errno or 0)}") from error
    why_not = _unfit(fd, writing)
    if why_not:
        os.close(fd)
        raise BadURI(f"{path} is {why_not}")
    if number is not None:
        if number == 1:
            os.dup2(2, 1)
        else:
            descriptors.let_go(number)
    return fd


def is_pipe(fd: int) -> bool:
    """Whether a machine can have it as it is."""
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def incoming_uri(fd: int) -> TransportURI:
    """Where a guest comes from that this process reads from ``fd``, which is taken over.

    Call it in the process that will have the machine: it may start a thread.
    """
    if not is_pipe(fd):
        reading, writing = os.pipe2(os.O_CLOEXEC)
        Copying(fd, writing)
        fd = reading
    return TransportURI("fd", descriptors.give("standard-input", fd))


class Copying:
    """A thread that copies from one descriptor to another until the end, and closes both."""

    def __init__(self, source: int, sink: int) -> None:
        #: Why it has ended before its time.
        self.error: OSError | None = None
        self._source, self._sink = source, sink
        self._thread = threading.Thread(target=self._run, name="kvmmig copying", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until everything that came is written, and on the disk where it has one."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while data := os.read(self._source, _PIECE):
                left = memoryview(data)
                while left:
                    left = left[os.write(self._sink, left) :]
            try:
                os.fsync(self._sink)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EROFS):  # no disk
                    raise
        except OSError as error:
            self.error = error
        finally:
            for fd in (self._source, self._sink):
                with suppress(OSError):
                    os.close(fd)


def _is_fifo(path: str) -> bool:
    with suppress(OSError, ValueError):  # who opens it says what is wrong with it
        return stat.S_ISFIFO(os.stat(path).st_mode)
    return False


def _unfit(fd: int, writing: bool) -> str:
    mode = os.fstat(fd).st_mode
    if os.isatty(fd):
        return "a terminal; redirect it"
    if stat.S_ISCHR(mode):
        return "a character device, which keeps nothing" if writing else "a character device; give a file"
    if stat.S_ISDIR(mode):
        return "a directory; give a file"
    return ""
