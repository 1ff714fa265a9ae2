"""The process that hosts a machine: its name, its monitors, its serial port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field

import trio

from kvmmig import __version__
from kvmmig.cli import rundir
from kvmmig.cli.consoleserver import ConsoleServer
from kvmmig.cli.detach import Background
from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.cli.lifetime import the_error
from kvmmig.cli.logs import logging_to
from kvmmig.cli.output import Output
from kvmmig.cli.serialport import SerialPort, open_serial
from kvmmig.cli.statuses import command_line
from kvmmig.cli.terminal import Keyboard
from kvmmig.errors import MachineError, WrongState
from kvmmig.machine import State
from kvmmig.machine.config import reserve_memory
from kvmmig.machine.populating import Reserve
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.parameters import ParameterChanges
from kvmmig.qmp import QMPServer
from kvmmig.qmp.address import Address, UnixAddress, parse_address

FAILED = 1


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """What the command line says of the process; ``background`` is None in the foreground.

    ``reserve`` is how many bytes of memory are to be there before the guest is, ``record`` the file that its
    migrations are recorded to.
    """

    name: str | None
    serial: str
    paused: bool = False
    qmp: tuple[str, ...] = ()
    no_exec: bool = False
    reserve: int | None = None
    record: str | None = None
    background: Background | None = None


@dataclass(frozen=True)
class MachineProcess:
    """A machine's name, and the files that are its own; without ``claim`` no other command can find it."""

    name: str
    claim: rundir.Claim | None
    options: ProcessOptions
    forced_exit: ForcedExit
    notice: str = ""
    #: Where its other monitors listen.
    monitors: list[str] = field(default_factory=list)

    def runs(self, what: str) -> None:
        """Let the command return that waits for a machine in the background; ``what`` it does there."""
        if self.options.background is not None:
            self.options.background.runs(self.name, "; QMP: ".join([what, *self.monitors]))


@contextmanager
def open_process(
    options: ProcessOptions, default_name: str, *, needs_monitor: bool, forced_exit: ForcedExit
) -> Iterator[MachineProcess]:
    """Take a name, and give it back at the end of the block, or before a forced exit.

    Raises `NameTaken`, `WrongCommandLine`, and `RuntimeDirectoryUnusable` where somebody has asked for what
    needs that directory; otherwise the machine runs without it, and ``notice`` says so.
    """
    background, notice = options.background, ""
    try:
        with command_line():
            claim = rundir.claim(options.name) if options.name else rundir.claim_like(default_name)
    except rundir.RuntimeDirectoryUnusable as error:
        if options.name is not None or background is not None or (needs_monitor and not options.qmp):
            raise
        claim, notice = None, f"kvmmig: no other command can reach this machine: {error}"
    name = claim.name if claim else default_name
    try:
        with forced_exit.before(claim.release) if claim is not None else nullcontext():
            if background is not None and claim is not None:
                background.log_to(claim)
            yield MachineProcess(name, claim, options, forced_exit, notice)
    finally:
        if claim is not None:
            claim.release()


@asynccontextmanager
async def serve_machine(process: MachineProcess) -> AsyncIterator[tuple[MachineControl, Output]]:
    """A machine under control, with all its monitors and its serial port served. It has no guest yet.

    What is logged meanwhile goes to the `Output`'s messages. From the end of the block on, however it ends,
    the machine's own end is bounded by a forced exit; before it, whoever knows the status may begin that.

    Raises `BadURI` and `ConnectFailed` for a ``--qmp`` that can't be, and `MachineError` for ``--serial``.
    """
    options, forced_exit = process.options, process.forced_exit
    async with _serial_port(process) as port:
        output = port.output
        if process.notice:
            output.say(process.notice)
        console = ConsoleServer(lambda data: _feed(control, data))
        to_port = options.background is None or options.serial != "-"

        def write(data: bytes) -> None:
            if to_port:
                output.serial(data)
            console.write(data)

        with (
            logging_to(output.say),
            forced_exit.saying(output.say),
            forced_exit.before(output.drain_briefly),
            _reserved(options.reserve) as reserve,
        ):
            try:
                async with MachineControl.open(
                    name=process.name, output=write, reserve=reserve, guest_follows=True
                ) as control:
                    control.settings.may_exec = not options.no_exec
                    if options.record is not None:
                        control.settings.change_parameters(ParameterChanges(x_kvmmig_record=options.record))
                    async with _served(control, console, process, output):
                        async with trio.open_nursery() as nursery:
                            if port.keyboard is not None:
                                nursery.start_soon(_type, port.keyboard, control)
                            try:
                                yield control, output
                            except Exception as error:
                                control.quit(reason="host-error")
                                forced_exit.begin(FAILED, str(the_error(error)))
                                raise
                            except BaseException:  # a cancel: it comes from a signal
                                control.quit(reason="host-signal")
                                raise
                            nursery.cancel_scope.cancel()
                    if not to_port and control.machine is not None and control.machine.state is State.ENDED:
                        output.serial(console.last_words)  # into the log: perhaps nobody has seen them
            finally:
                forced_exit.stop()  # a reader of the output may take as long as it likes for the rest


@contextmanager
def _reserved(size: int | None) -> Iterator[Reserve | None]:
    if size is None:
        yield None
        return
    with closing(reserve_memory(size)) as reserve:
        yield reserve


def _serial_port(process: MachineProcess) -> AbstractAsyncContextManager[SerialPort]:
    options = process.options
    return open_serial(options.serial, alone=options.background is not None, forced_exit=process.forced_exit)


@asynccontextmanager
async def _served(
    control: MachineControl, console: ConsoleServer, process: MachineProcess, output: Output
) -> AsyncIterator[None]:
    server = QMPServer(
        commands_for(control),
        version=f"kvmmig {__version__}",
        notices=lambda text: output.say(f"kvmmig: {text}"),
    )
    control.subscribe(server.emit)
    scopes: list[trio.CancelScope] = []

    async def serve(address: Address, *, task_status: trio.TaskStatus[str]) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await server.serve(address, task_status=task_status)

    async def start(address: Address) -> str:
        real: str = await nursery.start(serve, address)
        # Clients are to hear what ends the machine: so whatever ends it does not end this at the same time.
        # Not before it has started: a start that is cancelled waits for its task's end.
        scopes[-1].shield = True
        return real

    async with trio.open_nursery() as nursery:
        try:
            for address in process.options.qmp:
                real = await start(parse_address(address))
                process.monitors.append(real)
                listens = ",server=off" not in real and not real.startswith("fd:")
                output.say(f"kvmmig: its monitor {'listens on' if listens else 'is at'} {real}")
            if process.claim is not None:
                await start(UnixAddress(str(process.claim.monitor)))
            async with console.serving(process.claim.console) if process.claim else nullcontext():
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
