"""What a command's handler sees of the client that sent it: a name, and the descriptors it has passed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable

from kvmmig.qmp.messages import QMPError

_MOST_RECEIVED = 16  # descriptors that wait to be given a name
_MOST_NAMED = 64  # a client must not use up the whole process's


class Session:
    """One client, from its greeting until it is gone. Owns the descriptors in it."""

    def __init__(self, peer: str = "a client", room: Callable[[], int] = lambda: _MOST_RECEIVED) -> None:
        """``peer`` says who it is. ``room`` is for how many more descriptors the process has room."""
        self.peer = peer
        self._room = room
        #: Whether it has sent ``qmp_capabilities``: only then it may do anything else, and gets events.
        self.negotiated = False
        #: Whether it may ask for out-of-band execution, which no command here has.
        self.out_of_band = False
        #: Whether it has sent its last command: nothing is answered behind a ``quit``.
        self.ended = False
        #: Descriptors named by ``getfd``. Who takes one out of it owns it.
        self.fds: dict[str, int] = {}
        self._received: deque[int] = deque()

    @property
    def held(self) -> int:
        """How many descriptors it keeps open."""
        return len(self._received) + len(self.fds)

    def receive_fds(self, fds: Iterable[int]) -> None:
        """Take over descriptors that came with SCM_RIGHTS; those that are too many are closed."""
        for fd in fds:
            if len(self._received) < _MOST_RECEIVED and self._room() > 0:
                self._received.append(fd)
            else:
                os.close(fd)

    def take_received_fd(self) -> int:
        """The oldest descriptor that came with SCM_RIGHTS, which is the caller's now. Raises `QMPError`."""
        if not self._received:
            raise QMPError("No file descriptor supplied via SCM_RIGHTS")
        return self._received.popleft()

    def name_fd(self, name: str) -> None:
        """``getfd``: give the oldest descriptor this name; one that had it before is closed. Raises
        `QMPError`.

        A descriptor whose name is refused is closed, as QEMU does.
        """
        fd = self.take_received_fd()
        try:
            if not name or name[0].isdecimal():
                raise QMPError("Parameter 'fdname' expects a name not starting with a digit")
            if name not in self.fds and len(self.fds) >= _MOST_NAMED:
                raise QMPError(
                    f"{_MOST_NAMED} descriptors have names already; 'closefd' one that is not needed"
                )
        except QMPError:
            os.close(fd)
            raise
        former = self.fds.get(name)
        self.fds[name] = fd
        if former is not None:
            os.close(former)

    def close_fd(self, name: str) -> None:
        """``closefd``. Raises `QMPError`."""
        fd = self.fds.pop(name, None)
        if fd is None:
            raise QMPError(f"File descriptor named '{name}' not found")
        os.close(fd)

    def close(self) -> None:
        """Close every descriptor that nobody has taken."""
        while self._received:
            os.close(self._received.popleft())
        while self.fds:
            os.close(self.fds.popitem()[1])
