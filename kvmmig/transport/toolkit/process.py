"""A process at the other end of a pipe: an I/O helper, or a shell command."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from kvmmig.errors import ChannelBroken
from kvmmig.transport.toolkit.pipes import PipeChannel, PipeReceiver, PipeSender
from kvmmig.transport.toolkit.workers import Workers

_PIPE_SIZE = 1 << 20  # the most that an unprivileged process may ask for
_MOST_WORDS = 500
_LAST_WORDS = 2.0  # seconds that a process has for ending after it has closed its pipe


class Process:
    """A running process. Started by the constructor, which blocks for a moment and raises `OSError`.

    ``pipe`` is our end of its pipe, non-blocking: to its standard input where it is ``fed``, else from its
    standard output. What it writes to its standard error is kept, for the error if it fails. It has a session
    of its own, so that a terminal's Ctrl-C reaches only us, who decide what becomes of it. ``name`` is how a
    sentence calls it.
    """

    def __init__(self, command: Sequence[str], name: str, *, fed: bool, fds: Sequence[int] = ()) -> None:
        self.name = name
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.pipe, theirs = (writing, reading) if fed else (reading, writing)
        self._words_fd = os.memfd_create("kvmmig-last-words", os.MFD_CLOEXEC)
        try:
            with contextlib.suppress(PermissionError):  # of the user's limit on all pipes together
                fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            os.set_blocking(self.pipe, False)  # our end only: the other one is a file description of its own
            self._process = subprocess.Popen(
                command,
                stdin=theirs if fed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if fed else theirs,
                stderr=self._words_fd,
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError:
            os.close(self.pipe)
            os.close(self._words_fd)
            raise
        finally:
            os.close(theirs)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def status(self) -> int | None:
        """The exit status, or minus the signal that killed it; None while it lives. Does not block.

        It stays a zombie until `reap`: so its number, by which `kill` finds what it started, stays its own.
        """
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def hindrance(self) -> str:
        """What keeps it from going on, as far as the kernel tells: that it is stopped, or in a dead disk."""
        for pid in _family(self.pid):
            match _state(pid):
                case "T" | "t":
                    return f"{self.name} (process {pid}) is stopped; SIGCONT lets it go on"
                case "D":
                    return f"{self.name} (process {pid}) waits for a disk that does not answer"
        return ""

    def kill(self) -> None:
        """Kill it, and what it has started itself and left behind. Does not wait. Not after `reap`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for the process's end and close what is left. Blocks, for ever in a dead disk."""
        self._process.wait()
        os.close(self.pidfd)
        os.close(self._words_fd)

    def drop(self) -> None:
        """End one that no channel has taken over."""
        self.kill()
        os.close(self.pipe)
        self.reap()

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
        length = os.fstat(self._words_fd).st_size
        words = os.pread(self._words_fd, 1 << 16, max(0, length - (1 << 16))).decode(errors="replace")
        said = " ".join(words.split())[-_MOST_WORDS:]
        return f"{self.name} {ending}" + (f"; it said: {said}" if said else "")


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants: a shell waits for what it has started."""
    yield pid
    with contextlib.suppress(OSError):  # it has ended, or this kernel has no such list
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))


def _state(pid: int) -> str:
    try:
        # proc(5): the state comes behind the name, in which anything may stand
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class ProcessChannel(PipeChannel):
    """What both directions share: the process, and the end of it all. Takes over ``process``."""

    def __init__(self, process: Process, peer: str, at_end: Callable[[], None]) -> None:
        """``at_end`` is called by a thread when the process has ended, whatever this channel's end was."""
        super().__init__(process.pipe, peer)

        def end() -> None:
            process.reap()
            at_end()

        self._process = process
        self._hindrance = ""  # when it was aborted
        self._workers = Workers(f"end of {peer}", 1, end)

    def abort(self) -> None:
        """Kill the process; a thread waits for its end, which takes long only in a dead disk."""
        if not self._closed:
            self._hindrance = self._obstacle()
            self._end_process()
            super().abort()
            trio.lowlevel.notify_closing(self._process.pidfd)
            self._workers.stop()

    def waits_for(self) -> str:
        return self._hindrance if self._closed else self._obstacle()

    def _obstacle(self) -> str:
        return self._process.hindrance()

    def _end_process(self) -> None:
        self._process.kill()

    async def _process_ended(self) -> None:
        await self._wait_readable(self._process.pidfd)
        self._check()

    async def _process_ended_well(self) -> None:
        """Wait for its end; only its status says whether all went well."""
        await self._process_ended()
        if self._process.status != 0:
            raise self._fail(self._process.account())


class ProcessSender(ProcessChannel, PipeSender):
    """Feeds a process. `aclose` returns when it has ended well."""

    def __init__(self, process: Process, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        super().__init__(process, peer, at_end)

    async def _finish(self) -> None:
        await self._process_ended_well()

    def _wait_for_room(self) -> bool:
        # A full pipe is not enough to wait for: a dead process's child may hold its other end open.
        if self._poll(select.POLLOUT, [self._process.pidfd]):
            return True
        if self._stopping:
            return False
        raise BrokenPipeError

    async def _broken(self, error: Exception) -> ChannelBroken:
        with trio.move_on_after(_LAST_WORDS):
            await self._process_ended()
        return self._fail(self._process.account())

    def _check_reader(self, *, drained: bool) -> None:
        status = self._process.status
        if status or (status == 0 and not drained):
            raise self._fail(self._process.account())


class ProcessReceiver(ProcessChannel, PipeReceiver):
    """Reads what a process prints. The end of the pipe is the end of the stream only if it ends well."""

    def __init__(self, process: Process, peer: str) -> None:
        super().__init__(process, peer, lambda: None)

    async def _at_end(self) -> None:
        await self._process_ended_well()
