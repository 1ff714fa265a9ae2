"""How a machine is reached while it runs: its name, its monitors, its serial port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import trio

from kvmmig import __version__
from kvmmig.cli import rundir
from kvmmig.cli.consoleserver import ConsoleServer
from kvmmig.cli.detach import Background
from kvmmig.cli.output import Output
from kvmmig.cli.progress import Populating
from kvmmig.cli.serialport import SerialPort, open_serial
from kvmmig.cli.terminal import Keyboard
from kvmmig.errors import MachineError, WrongState
from kvmmig.machine import State
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import QMPServer


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the command line says of a machine's surroundings; ``background`` is None in the foreground."""

    name: str | None
    serial: str
    qmp: tuple[str, ...] = ()
    background: Background | None = None


@dataclass(frozen=True)
class Place:
    """A machine's name, and the files that are its own; without ``claim`` nobody can reach it by name."""

    name: str
    claim: rundir.Claim | None
    background: Background | None
    notice: str = ""
    #: Where its other monitors listen.
    monitors: list[str] = field(default_factory=list)

    def runs(self, what: str) -> None:
        """Let the command go that waits for a machine in the background, and say what it does there."""
        if self.background is not None:
            self.background.runs(self.name, "; QMP: ".join([what, *self.monitors]))


@contextmanager
def place_for(around: Surroundings, default_name: str, *, needs_monitor: bool) -> Iterator[Place]:
    """Take a name, and give it back at the end of the block.

    Raises `NameTaken`, `BadConfig`, and `RuntimeDirectoryUnusable` where somebody has asked for what needs
    that directory; otherwise the machine runs without it, and ``notice`` says so.
    """
    notice = ""
    try:
        claim = rundir.claim(around.name) if around.name is not None else rundir.claim_like(default_name)
    except rundir.RuntimeDirectoryUnusable as error:
        if around.name is not None or around.background is not None or (needs_monitor and not around.qmp):
            raise
        claim, notice = None, f"kvmmig: no other command can reach this machine: {error}"
    name = claim.name if claim else default_name
    try:
        if around.background is not None and claim is not None:
            around.background.log_to(claim.files.log)
        yield Place(name, claim, around.background, notice)
    finally:
        if claim is not None:
            claim.release()


@asynccontextmanager
async def reachable(place: Place, around: Surroundings) -> AsyncIterator[tuple[MachineControl, Output]]:
    """A machine under control, with all its monitors and its serial port served. It has no guest yet.

    Raises `BadURI` and `ConnectFailed` for a ``--qmp`` that can't be, and `MachineError` for ``--serial``.
    """
    async with _serial_port(around) as port:
        output = port.output
        if place.notice:
            output.say(place.notice)
        console = ConsoleServer(lambda data: _feed(control, data))
        to_port = around.background is None or around.serial != "-"

        def write(data: bytes) -> None:
            if to_port:
                output.serial(data)
            console.write(data)

        async with MachineControl.open(
            name=place.name, output=write, on_populate=Populating(output), guest_follows=True
        ) as control:
            async with _served(control, console, place, around, output):
                async with trio.open_nursery() as nursery:
                    if port.keyboard is not None:
                        nursery.start_soon(_type, port.keyboard, control)
                    try:
                        yield control, output
                    except Exception:
                        control.quit(reason="host-error")
                        raise
                    except BaseException:  # a cancel: it comes from a signal
                        control.quit(reason="host-signal")
                        raise
                    nursery.cancel_scope.cancel()
            if not to_port and control.machine is not None and control.machine.state is State.ENDED:
                output.serial(console.last_words)  # into the log: perhaps nobody has seen them


def _serial_port(around: Surroundings) -> AbstractAsyncContextManager[SerialPort]:
    return open_serial(around.serial, alone=around.background is not None)


@asynccontextmanager
async def _served(
    control: MachineControl, console: ConsoleServer, place: Place, around: Surroundings, output: Output
) -> AsyncIterator[None]:
    server = QMPServer(
        commands_for(control), version=f"kvmmig {__version__}", notices=lambda text: output.say(f"kvmmig: {text}")
    )
    control.subscribe(server.emit)
    scopes: list[trio.CancelScope] = []

    async def serve(address: str, *, task_status: trio.TaskStatus[str]) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await server.serve(address, task_status=task_status)

    async def start(address: str) -> str:
        real: str = await nursery.start(serve, address)
        # Clients are to hear what ends the machine: so whatever ends it does not end this at the same time.
        # Not before it has started: a start that is cancelled waits for its task's end.
        scopes[-1].shield = True
        return real

    async with trio.open_nursery() as nursery:
        try:
            for address in around.qmp:
                real = await start(address)
                place.monitors.append(real)
                output.say(f"kvmmig: its monitor listens on {real}")
            if place.claim is not None:
                await start(f"unix:{place.claim.files.monitor}")
            async with console.serving(place.claim.files.console) if place.claim else nullcontext():
                yield
        except OSError as error:
            raise MachineError(f"the serial port's socket can't be made: {error.strerror}") from error
        finally:
            for scope in scopes:
                scope.cancel()


async def _type(keyboard: Keyboard, control: MachineControl) -> None:
    await control.wait_guest()  # before that, standard input may be where it comes from
    await keyboard.feed(lambda data: _feed(control, data))


async def _feed(control: MachineControl, data: bytes) -> None:
    """Type at the guest, once it is there; when it has gone there is nobody to be typed at."""
    machine = await control.wait_guest()
    with suppress(WrongState):
        await machine.feed(data)
