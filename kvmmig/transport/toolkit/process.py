"""A process at the other end of a pipe: an I/O helper, or a shell command."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.lanes import ReceiveLane
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.pipeholder import PipeHolder
from kvmmig.transport.toolkit.pipes import PipeWriter
from kvmmig.transport.toolkit.words import why
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

    One that ``dies_with_us`` is killed, with its group, when this process is killed before `end_stream`: it
    would take the end of the pipe for the end of the stream. For a process that is fed.
    """

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        *,
        fed: bool,
        fds: Sequence[int] = (),
        dies_with_us: bool = False,
    ) -> None:
        self.name = name
        self._holder: PipeHolder | None = None
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
        if dies_with_us:
            try:
                self._holder = PipeHolder(self.pipe, self.pid)
            except OSError:
                self.drop()
                raise

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

    def end_stream(self) -> None:
        """Our end of the pipe is closed, and that is the end. Does not wait. Not after `reap`."""
        if self._holder is not None:
            self._holder.let_go()

    def kill(self) -> None:
        """Kill it, and what it has started itself and left behind. Does not wait. Not after `reap`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        """Wait for the process's end and close what is left. Blocks, for ever in a dead disk."""
        if self._holder is not None:
            self._holder.reap()  # first: as long as the process is no one's to reap, its number is its own
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


class ProcessWatch:
    """Waits for a process on the event loop, and sees to its end. Takes it over."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._gone = False
        self._last_hindrance = ""
        self._reaper = Workers(f"end of {process.name}", 1, process.reap)

    async def ended(self) -> None:
        """Wait for its end. Raises `ChannelClosed` after `leave`."""
        if not self._gone:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._process.pidfd)
        if self._gone:
            raise ChannelClosed(f"{self._process.name} was closed by this side")

    async def ended_well(self) -> None:
        """Wait for its end; only its status says whether all went well. Raises `ChannelBroken`."""
        await self.ended()
        if self._process.status != 0:
            raise ChannelBroken(self._process.account())

    def hindrance(self) -> str:
        """As `Process.hindrance`; after `leave`, how it was then."""
        return self._last_hindrance if self._gone else self._process.hindrance()

    def leave(self, *, kill: bool) -> None:
        """Have done with it, perhaps by force. A thread waits for its end, which takes long only in a dead
        disk. Idempotent.
        """
        if not self._gone:
            self._last_hindrance = self._process.hindrance()
            self._gone = True
            if kill:
                self._process.kill()
            trio.lowlevel.notify_closing(self._process.pidfd)
            self._reaper.stop()


class ProcessSender(SendChannel):
    """Feeds a process. `aclose` returns when it has ended well. Takes over ``process``.

    `flush` returns when it has taken everything out of the pipe; it counts as sending.
    """

    def __init__(
        self, process: Process, peer: str, *, spared: bool = False, waits: bool = True, hint: str = ""
    ) -> None:
        """``spared``: once the stream has ended it is not killed any more, whatever happens.

        ``waits``: `aclose` waits for its end; otherwise all is well when it has taken everything. ``hint`` is
        what `waits_for` advises while it has taken everything and does not end.
        """
        self.peer = peer
        self._process = process
        self._pipe = PipeWriter(process.pipe, peer, reader=process.pidfd)
        self._watch = ProcessWatch(process)
        self._sending = OneAtATime("sending")
        self._spared = spared
        self._waits = waits
        self._hint = hint
        self._has_all = False
        self._closed = False
        self._last_obstacle = ""
        self._failure = ""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            self._check()
            try:
                return await self._pipe.write_some(buffers)
            except OSError as error:
                raise await self._broken() from error

    async def flush(self) -> None:
        with self._sending:
            await self._drained()

    def abort(self) -> None:
        """Kill the process, unless it is spared and has all."""
        if not self._closed:
            self._last_obstacle = self.waits_for()
            self._closed = True
            self._watch.leave(kill=not (self._spared and self._has_all))
            self._pipe.abort()

    async def aclose(self) -> None:
        """Flush, end the stream, and wait until the process has ended well."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            with self._sending:
                await self._drained()
                self._has_all = True
                await self._pipe.end()
                self._process.end_stream()
                if self._waits:
                    await self._watch.ended_well()
        finally:
            self.abort()

    def waits_for(self) -> str:
        if self._closed:
            return self._last_obstacle
        obstacle = self._watch.hindrance()
        if not obstacle and self._has_all and self._hint:
            obstacle = f"process {self._process.pid} has taken all of it but does not end; {self._hint}"
        return obstacle

    async def _drained(self) -> None:
        self._check()
        try:
            await self._pipe.drained(self._check_reader)
        except OSError as error:
            raise await self._broken() from error

    def _check(self) -> None:
        if self._failure and not self._closed:
            raise ChannelBroken(self._failure)

    def _check_reader(self, left: int) -> None:
        status = self._process.status
        if status or (status == 0 and left):
            raise self._fail()

    async def _broken(self) -> ChannelBroken:
        with trio.move_on_after(_LAST_WORDS):
            await self._watch.ended()
        return self._fail()

    def _fail(self) -> ChannelBroken:
        self._failure = self._process.account()
        return ChannelBroken(self._failure)


class ProcessReceiver(ReceiveChannel):
    """Reads what a process prints. The end of the pipe is the end of the stream only if it ends well.

    Takes over ``process``.
    """

    def __init__(self, process: Process, peer: str, notices: tuple[str, ...] = ()) -> None:
        self.peer = peer
        self.notices = notices
        self._pipe = ReceiveLane(process.pipe, peer)
        self._watch = ProcessWatch(process)
        self._receiving = OneAtATime("receiving")

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            try:
                count = await self._pipe.receive_some(buffer)
            except OSError as error:
                raise ChannelBroken(f"{self.peer} is broken: {why(error)}") from error
            if count == 0:
                await self._watch.ended_well()
            return count

    def abort(self) -> None:
        """Kill the process."""
        self._watch.leave(kill=True)
        self._pipe.abort()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def waits_for(self) -> str:
        return self._watch.hindrance()
