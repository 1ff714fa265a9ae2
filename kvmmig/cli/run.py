"""``kvmmig run``: a guest's life here, from its load or arrival to its end, or until it has been migrated."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import trio

from kvmmig.cli import rundir
from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.logs import logging_to, to_stderr
from kvmmig.cli.loop_watch import watching_the_loop
from kvmmig.cli.machine_process import (
    FAILED,
    MachineProcess,
    ProcessOptions,
    open_process,
    serve_machine,
)
from kvmmig.cli.output import Output
from kvmmig.cli.programs import find_program
from kvmmig.cli.progress import run_with_progress, summary
from kvmmig.cli.scheduling import ask_for_short_slices
from kvmmig.cli.statuses import WrongCommandLine, command_line
from kvmmig.errors import BadConfig, BadURI, GuestEnded, KvmmigError, WrongState
from kvmmig.machine import MachineConfig, Program, State
from kvmmig.machine.config import OnHalt
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.welcome import Welcome
from kvmmig.monitor.control import MachineControl, Outcome
from kvmmig.transport import Transport, TransportURI, descriptors, transport_for
from kvmmig.transport.places import protect
from kvmmig.units import format_duration, format_size

#: The exit status for a guest that crashed: EX_SOFTWARE of <sysexits.h>.
CRASHED = 70

_PAUSED = "is paused in the background"
_Life = Callable[["MachineRun"], Awaitable[int]]


@dataclass(frozen=True, kw_only=True)
class NewGuest:
    """What to run, as the command line has it."""

    what: str
    entry: str | None = None
    memory: int = 256 << 20
    cpus: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    on_halt: OnHalt = "end"


@dataclass(frozen=True, kw_only=True)
class PlannedMigration:
    """Where to, and how many seconds after the guest's start."""

    uri: TransportURI
    after: float


@dataclass
class MachineRun:
    """One run of a machine by this command."""

    control: MachineControl
    output: Output
    process: MachineProcess
    #: The migration that this command itself has begun: others are a monitor's.
    own_migration: OutgoingMigration | None = None

    def say(self, text: str) -> None:
        """Tell the person who runs it."""
        self.output.say(f"kvmmig: {text}")

    def runs(self, what: str = "") -> None:
        """Let the command return that is waiting for this in the foreground; ``what`` it does there."""
        if not what:
            paused = self.control.machine is not None and self.control.machine.state is State.PAUSED
            what = "is paused in the background" if paused else "runs in the background"
        self.process.runs(f"{self.process.name!r} {what}")


def run_guest(guest: NewGuest, options: ProcessOptions, *, planned: PlannedMigration | None) -> int:
    """Run a guest, and perhaps migrate it; returns the exit status. Raises `KvmmigError`."""
    # Everything that can be wrong with the command line is found before there is a machine.
    with command_line():
        MachineConfig(memory=guest.memory, cpus=guest.cpus)
    program = _program(guest)
    config = MachineConfig(
        memory=guest.memory,
        cpus=guest.cpus,
        name=program.name,
        parameters=program.parameters,
        on_halt=guest.on_halt,
    )
    transport = _transport(planned.uri if planned else None)

    async def life(run: MachineRun) -> int:
        await run.control.load(config, program, start=not options.paused)
        run.runs(*([_PAUSED] if options.paused else []))
        if transport is None or planned is None:
            return await _until_end(run)
        return await _migrate(run, transport, planned.after)

    # A guest that was to be migrated, and was not, is a failure however it ends.
    return _run(life, options, program.name, status_of_quit=FAILED if planned else 0)


def _program(guest: NewGuest) -> Program:
    """Raises `BadImage` for a file that is no guest, `WrongCommandLine` where there is none of that name."""
    there = os.path.exists(guest.what)
    with nullcontext() if there else command_line():
        try:
            return find_program(
                guest.what, entry=guest.entry, memory=guest.memory, cpus=guest.cpus, settings=guest.settings
            )
        except BadConfig as error:
            raise WrongCommandLine(str(error)) from error


def run_incoming(
    uri: TransportURI | None,
    options: ProcessOptions,
    *,
    welcome: Welcome,
    default_name: str = "incoming",
    prefault: bool = False,
) -> int:
    """Run a guest that comes by migration; without ``uri`` a monitor's client says from where.

    ``prefault`` has the pages of one that comes from an image read while it runs. Returns the exit status.
    Raises `KvmmigError`.
    """
    transport = _transport(uri)
    if transport is not None and transport.arrives_at_once and welcome.accept_from is not None:
        raise BadURI(f"{transport.uri}: nobody connects to that, so --accept-from can't go with it")

    async def life(run: MachineRun) -> int:
        run.control.incoming.start = not options.paused
        run.control.incoming.welcome = welcome
        await (_listen(run, transport, prefault) if transport is not None else _defer(run))
        return await _until_end(run)

    return _run(life, options, default_name, needs_monitor=transport is None)


def _transport(uri: TransportURI | None) -> Transport | None:
    with logging_to(to_stderr):
        return transport_for(uri) if uri is not None else None


def _run(
    life: _Life,
    options: ProcessOptions,
    default_name: str,
    *,
    status_of_quit: int = 0,
    needs_monitor: bool = False,
) -> int:
    forced_exit = ForcedExit()
    descriptors.only_given()
    protect(rundir.directory())

    async def command() -> int:
        ask_for_short_slices()
        status = status_of_quit
        # From here on signals are heeded: none of them may leave the name behind.
        with open_process(
            options, default_name, needs_monitor=needs_monitor, forced_exit=forced_exit
        ) as process:
            async with serve_machine(process) as (control, output):
                with watching_the_loop(forced_exit, output.say):
                    async with trio.open_nursery() as nursery:

                        async def obey_quit() -> None:
                            if (await control.wait()).ending is None:
                                nursery.cancel_scope.cancel()

                        nursery.start_soon(obey_quit)
                        run = MachineRun(control, output, process)
                        nursery.start_soon(_report_outgoing, run)
                        status = await life(run)
                        nursery.cancel_scope.cancel()
                forced_exit.begin(status)
        return status

    return run_to_end(command, forced_exit=forced_exit)


async def _listen(run: MachineRun, transport: Transport, prefault: bool) -> None:
    control = run.control
    await control.incoming.listen(transport, prefault=prefault)
    waiting = f"waiting for a guest from {control.incoming.uri}"
    control.incoming.on_setback = lambda error: run.say(f"the guest did not come: {error}; still {waiting}")
    run.say(waiting)
    if not transport.arrives_at_once:
        run.runs(f"is {waiting}")
    await _receive(run)
    run.runs(*([_PAUSED] if run.process.options.paused else []))


async def _defer(run: MachineRun) -> None:
    run.control.incoming.defer()
    waiting = "waiting for a monitor's migrate-incoming"
    run.say(waiting)
    run.runs(f"is {waiting}")
    await run.control.wait_guest()
    await _receive(run)
    run.runs()


async def _receive(run: MachineRun) -> None:
    incoming = run.control.incoming
    await incoming.wait()
    machine, migration = await run.control.wait_guest(), incoming.migration
    assert migration is not None
    for notice in migration.notices:
        run.say(notice)
    how = "mapped from its image" if migration.mapped else format_size(migration.received_bytes)
    run.say(
        f"the guest {machine.config.name!r} has arrived from {migration.peer}: {how}, "
        f"{migration.received_pages} pages and {migration.zero_pages} that are zero, in "
        f"{format_duration(migration.total_time or 0.0)}"
    )
    if machine.state is State.PAUSED:
        run.say(f'it is paused, as it was there; "kvmmig resume {run.control.name}" lets it go on')


async def _until_end(run: MachineRun) -> int:
    return _exit_status(run, await run.control.wait())


async def _migrate(run: MachineRun, transport: Transport, after: float) -> int:
    control = run.control
    try:
        with trio.move_on_after(after):
            ending = (await control.wait()).ending
            if ending is None:
                return FAILED
            raise GuestEnded(f"the guest ended before it was to move: {ending}")
        migration = run.own_migration = control.outgoing.begin(transport)
        figures = await run_with_progress(migration, run.output, run=control.outgoing.wait)
    except KvmmigError as error:
        run.say(str(error))
        await _ask_operator(run)
        if control.run_state() == "running":
            run.say("the guest goes on running here")
    else:
        run.output.say(summary(figures))
        return 0
    await _until_end(run)
    return FAILED


async def _report_outgoing(run: MachineRun) -> None:
    """A guest that a monitor's client has migrated leaves a machine behind, which somebody should know."""
    control = run.control
    machine = await control.wait_guest()
    while True:
        if (await machine.wait()).kind != "moved":
            return
        if control.outgoing.migration is run.own_migration:
            await control.wait_taken_back()
            continue
        try:
            figures = await control.outgoing.wait()
        except KvmmigError as error:
            run.say(str(error))
            await _ask_operator(run)
            run.say("the guest goes on running here")
        else:
            run.say(
                f"the guest has moved to {figures.peer}; what is left of it here answers until "
                f'"kvmmig quit {control.name}", or Ctrl-C'
            )
            await control.wait_taken_back()


async def _ask_operator(run: MachineRun) -> None:
    """Keep a guest that was handed over until somebody says that it does not run on the other side."""
    control = run.control
    if control.machine is None or control.machine.state is not State.MOVED:
        return
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        run.say(
            f"if it does not run there, kill -USR1 {os.getpid()} lets it go on here, as "
            f'"kvmmig resume {control.name} --force" does; if it does, Ctrl-C ends what is left of it here'
        )
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for _ in signals:
                    with suppress(WrongState):  # somebody else was faster
                        await control.take_back()

            nursery.start_soon(obey)
            await control.wait_taken_back()
            nursery.cancel_scope.cancel()


def _exit_status(run: MachineRun, outcome: Outcome) -> int:
    """What the command says, and exits with, when the machine's life has ended so."""
    ending = outcome.ending
    if ending is None:
        return 0
    match ending.kind:
        case "exit":
            return ending.status
        case "halted":
            run.say(f"the guest halted: {ending.report}")
            return 0
        case "crash":
            run.say(f"the guest crashed: {ending.report}")
            return CRASHED
        case "moved":
            return 0
        case "reset" | "ended":
            run.say(f"the guest ended: {ending}")
            return 0
