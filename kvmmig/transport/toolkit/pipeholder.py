"""The writing end of a pipe, held open by a small process, so that our death is not taken for the end.

When a process is killed the kernel closes its pipes, and a command that reads from one sees an end like any
other: ``gzip > a.gz && mv a.gz b.gz`` would give half a guest the name of a whole one. The holder has the
writing end too. It is told when the stream has ended; if it finds instead that we have gone it kills the
command and all of its process group first, and only then lets go.
"""

from __future__ import annotations

import contextlib
import os
import subprocess

# "read" fails at the end of standard input, which comes without a line when we are killed.
_HOLD = 'read -r _ || kill -9 "-$1"'


class PipeHolder:
    """Holds ``writing``, a descriptor that stays the caller's. Made by a constructor that blocks for a moment
    and raises `OSError`; `reap` must be called in the end.
    """

    def __init__(self, writing: int, group: int) -> None:
        """``group`` is the process group that dies when we do."""
        theirs, self._life = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _HOLD, "sh", str(group)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writing,),
                start_new_session=True,
            )
        except OSError:
            os.close(self._life)
            raise
        finally:
            os.close(theirs)

    def let_go(self) -> None:
        """The stream has ended. Does not wait. Idempotent, not after `reap`."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            os.write(self._life, b"\n")

    def kill(self) -> None:
        """Let go at once, and kill nobody. Does not wait."""
        self._process.kill()

    def reap(self) -> None:
        """Wait for its end. Blocks for a moment."""
        self.kill()
        self._process.wait()
        os.close(self._life)
