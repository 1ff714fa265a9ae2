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

from kvmmig_transports import iohelper
from tests.faults.cells import OF_A_PEER, Cell, Fault, Moment
from tests.faults.disk import Disk
from tests.faults.held import Hold
from tests.faults.network import HERE, THERE
from tests.faults.traces import descendants
from tests.faults.until import until
from tests.faults.world import World

_RATE = 1_000_000
_OLDER = b"an older save, which a failed one must leave alone"
_SIGNALS = {
    Fault.PEER_KILLED: signal.SIGKILL,
    Fault.PEER_STOPPED: signal.SIGSTOP,
    Fault.HELPER_KILLED: signal.SIGKILL,
    Fault.HELPER_STOPPED: signal.SIGSTOP,
}


class Stage(ABC):
    """One other side."""

    #: Where to migrate to.
    uri: str
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

    async def heal(self) -> None:
        """End what keeps a process or a thread hanging, before what is left is looked at."""
        await trio.lowlevel.checkpoint()

    def leftovers(self) -> tuple[str, ...]:
        """What the migration has left on the other side, in sentences."""
        return ()


def stage_for(cell: Cell, world: World) -> AbstractAsyncContextManager[Stage]:
    """A fresh one, taken down at the end of the block."""
    match cell.transport:
        case "tcp" | "unix":
            return PeerStage.open(cell, world)
        case "pipe":
            return PipeStage.open(cell)
        case "file":
            return FileStage.open(cell)
        case _:
            return ExecStage.open(cell)


class PeerStage(Stage):
    """A process that waits for the guest, at the other end of a cable or of a Unix socket."""

    def __init__(self, cell: Cell, world: World, process: trio.Process, uri: str) -> None:
        self.uri = uri
        self.swallows = 2 << 20 if uri.startswith("unix:") else 256 << 10
        self.name = uri.partition(":")[2]
        self._cell = cell
        self._world = world
        self._process = process

    @classmethod
    @asynccontextmanager
    async def open(cls, cell: Cell, world: World) -> AsyncIterator[Stage]:
        enter: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            if cell.transport == "unix":
                uri = f"unix:{folder}/socket"
            elif world.cable:
                enter, uri = world.cable.enter, f"tcp:{THERE}:0"
            else:
                uri = "tcp:127.0.0.1:0"
            command = [*enter, sys.executable, "-m", "tests.faults.peer", uri, _kept_back(cell)]
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            async with process.stdin, process.stdout:  # type: ignore[union-attr]  # both are pipes
                try:
                    uri = await _line(process)
                    if cell.fault is Fault.NOT_WRITABLE:
                        uri = _nobody_at(cell, folder)
                    yield cls(cell, world, process, uri)
                finally:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()
                        if world.cable and cell.fault is Fault.LINK_CUT:
                            await trio.to_thread.run_sync(world.cable.mend)

    async def strike(self) -> None:
        match self._cell.fault:
            case Fault.LINK_CUT:
                assert self._world.cable is not None  # else the cell is unavailable
                await trio.to_thread.run_sync(self._world.cable.cut)
            case Fault.SLOW_SINK:
                await self.slow_down(_RATE)
            case fault if fault in _SIGNALS:
                self._process.send_signal(_SIGNALS[fault])
                if fault is Fault.PEER_KILLED:
                    await self._process.wait()  # a dying process still listens for a moment

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
    return ""


def _nobody_at(cell: Cell, folder: str) -> str:
    if cell.transport == "tcp":
        return f"tcp:{HERE}:1"
    path = Path(folder) / "no-socket"
    path.touch()
    return f"unix:{path}"


async def _line(process: trio.Process) -> str:
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"\n"):
        more = await process.stdout.receive_some()
        if not more:
            raise RuntimeError("the other side did not start")
        text += more
    return text.decode().strip()


class DiskStage(Stage):
    """A path on a disk of our own."""

    swallows = 8 << 20

    def __init__(self, cell: Cell, disk: Disk, scripts: Path) -> None:
        self.path = disk.folder / "guest.img"
        self.name = str(self.path)
        self.cell = cell
        self.disk = disk
        self.scripts = scripts
        self._before = set(descendants(os.getpid()))
        if cell.moment in (Moment.HELLO, Moment.COMMIT):
            self.hold = Hold(cell.moment)
        self.uri = self.make_uri()

    @classmethod
    @asynccontextmanager
    async def open(cls, cell: Cell) -> AsyncIterator[Stage]:
        manager = Disk.open()
        disk = await trio.to_thread.run_sync(manager.__enter__)
        try:
            with tempfile.TemporaryDirectory() as scripts:
                stage = cls(cell, disk, Path(scripts))
                await trio.to_thread.run_sync(stage.path.write_bytes, _OLDER)
                try:
                    yield stage
                finally:
                    for pid in stage.new_processes():
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)

    @abstractmethod
    def make_uri(self) -> str:
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


class FileStage(DiskStage):
    """A file that this process writes."""

    def make_uri(self) -> str:
        return f"file:{self.path}"


class PipeStage(DiskStage):
    """A file that a helper process writes."""

    def make_uri(self) -> str:
        uri = f"pipe:{self.path}"
        if first := _first_act(self.cell):
            script = self.scripts / "helper"
            ours = shlex.join([sys.executable, "-I", "-S", iohelper.__file__])
            script.write_text(f'#!/bin/sh\n{first}exec {ours} "$@"\n')
            script.chmod(0o700)
            uri += f"?helper={script}"
        return uri


class ExecStage(DiskStage):
    """A shell command that writes a file; or, where the fault is about a peer, one that is a kvmmig itself.

    What a command leaves of its file is its own affair, so no file is looked for.
    """

    name = "the command"
    swallows = 1 << 20

    def make_uri(self) -> str:
        first = _first_act(self.cell)
        self.name = type(self).name
        self._peer_says = self.scripts / "peer-says"
        if self._has_peer:
            peer = shlex.join([sys.executable, "-m", "tests.faults.peer", "fd:0"])
            return f"exec:{first}exec {peer} > {self._peer_says}?live=on"
        # Unlike cat, dd can be told to look whether the disk has really taken everything.
        dd = f"dd of={self.path} bs=1M iflag=fullblock oflag=direct conv=fsync status=none"
        return f"exec:{first}{dd}?live=off"

    async def settle(self) -> None:
        """The peer is started by the connect, and is not struck before it listens."""
        if self._has_peer and self.cell.moment is not Moment.CONNECT:
            await until(lambda: self._peer_says.exists() and self._peer_says.stat().st_size > 0)

    def leftovers(self) -> tuple[str, ...]:
        return ()

    @property
    def _has_peer(self) -> bool:
        return self.cell.fault in OF_A_PEER


def _first_act(cell: Cell) -> str:
    """What a helper process does before its work."""
    match cell.fault:
        case Fault.HELPER_KILLED | Fault.PEER_KILLED if cell.moment is Moment.CONNECT:
            return "kill -KILL $$; "
        case Fault.HELPER_STOPPED | Fault.PEER_STOPPED if cell.moment is Moment.CONNECT:
            return "kill -STOP $$; "
        case Fault.SLOW_START:
            return "sleep 60; "
    return ""
