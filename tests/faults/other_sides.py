"""The other side of each transport, set up afresh for one run, with what it takes to break it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import trio

from kvmmig.transport import TransportURI
from kvmmig_transports import iohelper
from tests.faults.disk import Disk
from tests.faults.hold import Hold
from tests.faults.host import Host
from tests.faults.matrix import OF_A_PEER, Cell, Fault, Moment
from tests.faults.network import HERE, THERE
from tests.faults.resources import descendants
from tests.faults.waiting import until

_RATE = 1_000_000
_OLDER = b"an older save, which a failed one must leave alone"
_SIGNALS = {
    Fault.PEER_KILLED: signal.SIGKILL,
    Fault.PEER_STOPPED: signal.SIGSTOP,
    Fault.HELPER_KILLED: signal.SIGKILL,
    Fault.HELPER_STOPPED: signal.SIGSTOP,
}


class OtherSide(ABC):
    """One other side."""

    #: Where to migrate to.
    uri: TransportURI
    #: What an error must name.
    name: str
    #: Where the migration is to be held for the strike; None where the other side itself holds it.
    hold: Hold | None = None
    #: Bytes that the way takes at once although its far end takes none.
    swallows: int

    @abstractmethod
    async def strike(self) -> None:
        """Let the fault happen. Never holds the event loop."""

    async def settle(self) -> None:
        """Called between the connect and the first byte: return when the other side has got going."""
        await trio.lowlevel.checkpoint()

    @abstractmethod
    def kill(self) -> None:
        """End whoever might run the guest there, as an operator does who takes it back."""

    async def heal(self) -> None:
        """End what keeps a process or a thread hanging, before what is left is looked at."""
        await trio.lowlevel.checkpoint()

    def leftovers(self) -> tuple[str, ...]:
        """What the migration has left on the other side, in sentences."""
        return ()


def other_side_for(cell: Cell, host: Host) -> AbstractAsyncContextManager[OtherSide]:
    """A fresh one, taken down at the end of the block."""
    match cell.transport:
        case "tcp" | "unix":
            return ProcessSide.open(cell, host)
        case "pipe":
            return PipeSide.open(cell)
        case "file":
            return FileSide.open(cell)
        case _:
            return ExecSide.open(cell)


class ProcessSide(OtherSide):
    """A process that waits for the guest, at the other end of a cable or of a Unix socket."""

    def __init__(self, cell: Cell, host: Host, process: trio.Process, uri: TransportURI) -> None:
        self.uri = uri
        self.swallows = 2 << 20 if uri.scheme == "unix" else 256 << 10
        self.name = uri.target
        self._cell = cell
        self._host = host
        self._process = process

    @classmethod
    @asynccontextmanager
    async def open(cls, cell: Cell, host: Host) -> AsyncIterator[OtherSide]:
        enter: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            if cell.transport == "unix":
                uri = TransportURI("unix", f"{folder}/socket")
            elif host.cable:
                enter, uri = host.cable.enter, TransportURI("tcp", f"{THERE}:0")
            else:
                uri = TransportURI("tcp", "127.0.0.1:0")
            command = [*enter, sys.executable, "-m", "tests.faults.destination", str(uri), _kept_back(cell)]
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            async with process.stdin, process.stdout:  # type: ignore[union-attr]  # both are pipes
                try:
                    uri = TransportURI.parse(await _line(process))
                    if cell.fault is Fault.NOT_WRITABLE:
                        uri = _nobody_at(cell, folder)
                    yield cls(cell, host, process, uri)
                finally:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()
                        if host.cable and cell.fault is Fault.LINK_CUT:
                            await trio.to_thread.run_sync(host.cable.mend)

    async def strike(self) -> None:
        match self._cell.fault:
            case Fault.LINK_CUT:
                assert self._host.cable is not None  # else the cell is unavailable
                await trio.to_thread.run_sync(self._host.cable.cut)
            case Fault.SLOW_SINK:
                await self.slow_down(_RATE)
            case fault if fault in _SIGNALS:
                self._process.send_signal(_SIGNALS[fault])
                if fault is Fault.PEER_KILLED:
                    await self._process.wait()  # a dying process still listens for a moment

    def kill(self) -> None:
        self._process.kill()

    async def slow_down(self, bytes_per_second: int) -> None:
        """The peer reads no faster from here on."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(b"%d\n" % bytes_per_second)
        await _line(self._process)


def _kept_back(cell: Cell) -> str:
    match cell.moment:
        case Moment.CONNECT if cell.fault is Fault.SLOW_START:
            return "everything"
        case Moment.HELLO:
            return "accept"
        case Moment.COMMIT:
            return "ready"
        case Moment.HANDED_OVER:
            return "running"
    return ""


def _nobody_at(cell: Cell, folder: str) -> TransportURI:
    if cell.transport == "tcp":
        return TransportURI("tcp", f"{HERE}:1")
    path = Path(folder) / "no-socket"
    path.touch()
    return TransportURI("unix", str(path))


async def _line(process: trio.Process) -> str:
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"\n"):
        more = await process.stdout.receive_some()
        if not more:
            raise RuntimeError("the other side did not start")
        text += more
    return text.decode().strip()


class DiskSide(OtherSide):
    """A path on a disk of our own."""

    swallows = 8 << 20

    def __init__(self, cell: Cell, disk: Disk, scripts: Path) -> None:
        self.path = disk.folder / "guest.img"
        self.name = str(self.path)
        self.cell = cell
        self.disk = disk
        self.scripts = scripts
        self._before = set(descendants(os.getpid()))
        if cell.moment in (Moment.HELLO, Moment.COMMIT, Moment.HANDED_OVER):
            self.hold = Hold(cell.moment)
        self.uri = self.make_uri()

    @classmethod
    @asynccontextmanager
    async def open(cls, cell: Cell) -> AsyncIterator[OtherSide]:
        manager = Disk.open()
        disk = await trio.to_thread.run_sync(manager.__enter__)
        try:
            with tempfile.TemporaryDirectory() as scripts:
                side = cls(cell, disk, Path(scripts))
                await trio.to_thread.run_sync(side.path.write_bytes, _OLDER)
                try:
                    yield side
                finally:
                    side.kill()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)

    @abstractmethod
    def make_uri(self) -> TransportURI:
        """Where to migrate to, with this cell's fault built in where it strikes at the connect."""

    async def strike(self) -> None:
        disk = self.disk
        match self.cell.fault:
            case Fault.DISK_FULL:
                await trio.to_thread.run_sync(disk.fill)
            case Fault.WRITE_ERROR:
                await trio.to_thread.run_sync(disk.break_writes)
            case Fault.FROZEN:
                await trio.to_thread.run_sync(disk.freeze)
            case Fault.NOT_WRITABLE if self.cell.moment is Moment.CONNECT:
                await trio.to_thread.run_sync(disk.make_read_only)
            case Fault.NOT_WRITABLE:
                await trio.to_thread.run_sync(disk.forbid_new_names)
            case Fault.SLOW_SINK:
                await trio.to_thread.run_sync(disk.slow_down, _RATE)
            case fault if fault in _SIGNALS and self.cell.moment is not Moment.CONNECT:
                self.signal(_SIGNALS[fault])

    def kill(self) -> None:
        for pid in self.new_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to those processes that the fault is about."""
        for pid in self.new_processes():
            os.kill(pid, number)

    def new_processes(self) -> dict[int, str]:
        """All that was started since, by number and name."""
        found = descendants(os.getpid())
        return {pid: name for pid, name in found.items() if pid not in self._before}

    async def heal(self) -> None:
        await trio.to_thread.run_sync(self.disk.heal)

    def leftovers(self) -> tuple[str, ...]:
        extra = self.disk.files() - {self.path.name}
        found = [f"the partial file {name!r} is left" for name in extra]
        if self.path.read_bytes() != _OLDER:
            found.append("the older file is gone or changed")
        return tuple(found)


class FileSide(DiskSide):
    """A file that this process writes."""

    def make_uri(self) -> TransportURI:
        return TransportURI("file", str(self.path))


class PipeSide(DiskSide):
    """A file that a helper process writes."""

    def make_uri(self) -> TransportURI:
        options = {}
        if first := _first_command(self.cell):
            script = self.scripts / "helper"
            ours = shlex.join([sys.executable, "-I", "-S", iohelper.__file__])
            script.write_text(f'#!/bin/sh\n{first}exec {ours} "$@"\n')
            script.chmod(0o700)
            options["helper"] = str(script)
        return TransportURI("pipe", str(self.path), options)


class ExecSide(DiskSide):
    """A shell command that writes a file; or, where the fault is about a peer, one that is a kvmmig itself.

    What a command leaves of its file is its own affair, so no file is looked for.
    """

    name = "the command"
    swallows = 1 << 20

    def make_uri(self) -> TransportURI:
        first = _first_command(self.cell)
        self.name = type(self).name
        self._peer_says = self.scripts / "peer-says"
        if self._has_peer:
            peer = shlex.join([sys.executable, "-m", "tests.faults.destination", "fd:0"])
            return TransportURI("exec", f"{first}exec {peer} > {self._peer_says}", {"live": "on"})
        # Unlike cat, dd can be told to look whether the disk has really taken everything.
        dd = f"dd of={self.path} bs=1M iflag=fullblock oflag=direct conv=fsync status=none"
        return TransportURI("exec", f"{first}{dd}", {"live": "off"})

    async def settle(self) -> None:
        """The peer is started by the connect, and is not struck before it listens."""
        if self._has_peer and self.cell.moment is not Moment.CONNECT:
            await until(lambda: self._peer_says.exists() and self._peer_says.stat().st_size > 0)

    def leftovers(self) -> tuple[str, ...]:
        return ()

    @property
    def _has_peer(self) -> bool:
        return self.cell.fault in OF_A_PEER


def _first_command(cell: Cell) -> str:
    """What a helper process does before its work."""
    match cell.fault:
        case Fault.HELPER_KILLED | Fault.PEER_KILLED if cell.moment is Moment.CONNECT:
            return "kill -KILL $$; "
        case Fault.HELPER_STOPPED | Fault.PEER_STOPPED if cell.moment is Moment.CONNECT:
            return "kill -STOP $$; "
        case Fault.SLOW_START:
            return "sleep 60; "
    return ""
