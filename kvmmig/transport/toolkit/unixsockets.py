"""Unix sockets that have a file: for their user alone, in a dead one's place, removed at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct

_CREDENTIALS = struct.Struct("iII")  # struct ucred of <sys/socket.h>: pid, uid, gid


class PathTaken(Exception):
    """Something is at the path. ``mode`` is its ``st_mode``; 0 is a socket on which somebody listens."""

    def __init__(self, mode: int = 0) -> None:
        super().__init__(f"mode {mode:o}")
        self.mode = mode


class SocketFile:
    """The file that was bound, to be removed unless another has taken its name meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._identity = self._look()

    def remove(self) -> None:
        """Never raises. May wait for a disk."""
        with contextlib.suppress(OSError):
            if self._look() == self._identity:
                os.unlink(self._path)

    def _look(self) -> tuple[int, int]:
        found = os.lstat(self._path)
        return found.st_dev, found.st_ino


def listen(path: str, backlog: int) -> tuple[socket.socket, SocketFile]:
    """A stream socket that listens there, its file with mode 0600 from the beginning.

    What a dead listener has left is replaced. Raises `PathTaken` and `OSError`. Looking up a path may wait
    for a disk, so this belongs in a thread.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        os.fchmod(sock.fileno(), 0o600)  # before it has a name: bind gives the file these rights
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PathTaken from error
            raise
        sock.listen(backlog)
        return sock, SocketFile(path)
    except BaseException:
        sock.close()
        raise


def open_to_all(path: str) -> None:
    """Let every user of the host connect to a socket file; whoever accepts them has to see who they are.

    Does nothing where there is anything else than a socket of this user's, such as a link. Raises `OSError`.
    May wait for a disk.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{fd}", 0o666)
    finally:
        os.close(fd)


def try_connect(path: str) -> socket.socket | None:
    """A non-blocking socket that is connected there; None where so many wait already that it has to wait too.

    No event says when it is worth another try. Raises `OSError`.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BlockingIOError:
        sock.close()
        return None
    except OSError:
        sock.close()
        raise
    return sock


def peer_user(sock: socket.socket) -> int:
    """The number of the user at the other end: of who has connected, or of who has begun to listen there."""
    size = _CREDENTIALS.size
    user: int = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]
    return user


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on; refuse to touch anything else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise PathTaken(mode)
    # A datagram socket can't connect to a stream socket, but learns whether somebody has it open; and a
    # listener takes no notice of the attempt.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    raise PathTaken
