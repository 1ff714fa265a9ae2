"""An I/O helper process: a program that copies between a pipe and a file that it inherits, already open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys

from kvmmig.errors import ConnectFailed
from kvmmig_transports import iohelper
from kvmmig_transports._savefile import why

_PIPE_SIZE = 1 << 20  # the most that an unprivileged process may ask for
_MOST_WORDS = 500


def find_program(helper: str) -> list[str]:
    """The command line of ``helper`` without its two arguments; ours where it is empty.

    Raises `ConnectFailed` for a program that is not there.
    """
    if not helper:
        return [sys.executable, "-I", "-S", iohelper.__file__]
    program = shutil.which(helper)
    if program is None:
        where = "there is no such program" if "/" in helper else "no directory of PATH has such a program"
        raise ConnectFailed(f"can't start the I/O helper {helper}: {where}")
    return [program]


class Helper:
    """A running helper. Started by the constructor, which blocks for a moment and raises `ConnectFailed`.

    ``pipe`` is our end of its pipe, non-blocking. What it prints is kept, for the error if it fails. It has
    a session of its own, so that a terminal's Ctrl-C reaches only us, who decide what becomes of it.
    """

    def __init__(self, program: list[str], path: str, fd: int, *, writes_file: bool) -> None:
        self.path = path
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.pipe, theirs = (writing, reading) if writes_file else (reading, writing)
        self._words_fd = os.memfd_create("kvmmig-helper-words", os.MFD_CLOEXEC)
        try:
            with contextlib.suppress(PermissionError):  # of the user's limit on all pipes together
                fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            os.set_blocking(self.pipe, False)  # our end only: the helper's is a file description of its own
            self._process = subprocess.Popen(
                [*program, path, str(fd)],
                stdin=theirs if writes_file else subprocess.DEVNULL,
                stdout=self._words_fd if writes_file else theirs,
                stderr=self._words_fd,
                pass_fds=(fd,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self.pipe)
            os.close(self._words_fd)
            raise ConnectFailed(f"can't start the I/O helper {program[0]}: {why(error)}") from error
        finally:
            os.close(theirs)
        self.pidfd = os.pidfd_open(self._process.pid)

    @property
    def status(self) -> int | None:
        """The exit status, or minus the signal that killed it; None while it lives. Does not block.

        It stays a zombie until `reap`: so its number, by which `kill` finds what it started, stays its own.
        """
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def close_pipe(self) -> None:
        """Close our end. Idempotent; for a helper that writes a file it is the end of the stream."""
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def kill(self) -> None:
        """Kill it, and what it has started itself and left behind. Does not wait. Not after `reap`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for the process's end and close what is left. Blocks, for ever in a dead disk."""
        self._process.wait()
        os.close(self.pidfd)
        os.close(self._words_fd)

    def account(self) -> str:
        """How it ended, with its own words, as a sentence; where that is an error."""
        status = self.status
        if status is None:
            ending = "closed its pipe but lives on"
        elif status < 0:
            ending = f"was killed by {signal.Signals(-status).name}"
        elif status > 0:
            ending = f"ended with status {status}"
        else:
            ending = "ended before it had taken everything"
        words = os.pread(self._words_fd, 1 << 16, 0).decode(errors="replace")
        said = " ".join(words.split())[-_MOST_WORDS:]
        return f"the I/O helper of {self.path} {ending}" + (f"; it said: {said}" if said else "")
