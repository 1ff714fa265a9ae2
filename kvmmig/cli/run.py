"""``kvmmig run``: a guest's life on this side, from its load or its arrival to its end or its leaving."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.output import Output
from kvmmig.cli.programs import find_program
from kvmmig.cli.progress import run_with_progress, summary
from kvmmig.cli.reach import Place, Surroundings, place_for, reachable
from kvmmig.errors import GuestEnded, KvmmigError, OutcomeUnknown
from kvmmig.machine import MachineConfig, State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.transport.registry import transport_for
from kvmmig.transport import Transport
from kvmmig.monitor.control import MachineControl, Outcome
from kvmmig.units import format_duration, format_size

#: The exit status for a guest that crashed: EX_SOFTWARE of <sysexits.h>.
CRASHED = 70
FAILED = 1

_Story = Callable[["Stage"], Awaitable[int]]
#: Transports that have their source when they begin; the others wait for one.
_ARRIVES_AT_ONCE = ("file", "pipe", "exec", "fd")


@dataclass(frozen=True, kw_only=True)
class NewGuest:
    """What to run, as the command line has it."""

    what: str
    entry: str | None = None
    memory: int = 256 << 20
    cpus: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Where to, and how many seconds after its start."""

    uri: str
    after: float


@dataclass
class Stage:
    """Where a guest's story takes place."""

    control: MachineControl
    output: Output
    place: Place
    #: The migration that the story itself has begun: others are a monitor's.
    own_migration: OutgoingMigration | None = None

    def runs(self, what: str = "runs in the background") -> None:
        """Tell the command that is waiting for this what the machine does now, in the background."""
        self.place.runs(f"{self.place.name!r} {what}")


def run_guest(guest: NewGuest, around: Surroundings, *, leaving: Leaving | None) -> int:
    """Run a guest, and perhaps migrate it; returns the exit status. Raises `KvmmigError`."""
    # Everything that can be wrong with the command line is found before there is a machine.
    MachineConfig(memory=guest.memory, cpus=guest.cpus)
    program = find_program(
        guest.what, entry=guest.entry, memory=guest.memory, cpus=guest.cpus, settings=guest.settings
    )
    config = MachineConfig(
        memory=guest.memory, cpus=guest.cpus, name=program.name, parameters=program.parameters
    )
    transport = transport_for(leaving.uri) if leaving else None

    async def story(stage: Stage) -> int:
        await stage.control.load(config, program, start=True)
        stage.runs()
        if transport is None or leaving is None:
            return await _until_end(stage)
        return await _leave(stage, transport, leaving.after)

    # A guest that was to move, and did not, is a failure however it ends.
    return _tell(story, around, program.name, status_of_quit=FAILED if leaving else 0)


def run_incoming(uri: str, around: Surroundings, *, default_name: str = "incoming") -> int:
    """Take a guest in and run it; returns the exit status. Raises `KvmmigError`."""
    transport = transport_for(uri) if uri != "defer" else None

    async def story(stage: Stage) -> int:
        await (_take_in(stage, transport) if transport is not None else _take_in_later(stage))
        return await _until_end(stage)

    return _tell(story, around, default_name, needs_monitor=transport is None)


def _tell(
    story: _Story,
    around: Surroundings,
    default_name: str,
    *,
    status_of_quit: int = 0,
    needs_monitor: bool = False,
) -> int:
    async def command() -> int:
        status = status_of_quit
        # From here on signals are heeded: none of them may leave the name behind.
        with place_for(around, default_name, needs_monitor=needs_monitor) as place:
            async with reachable(place, around) as (control, output), trio.open_nursery() as nursery:

                async def quit_when_told() -> None:
                    if (await control.wait()).ending is None:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(quit_when_told)
                stage = Stage(control, output, place)
                nursery.start_soon(_tell_of_leaving, stage)
                status = await story(stage)
                nursery.cancel_scope.cancel()
        return status

    return run_to_end(command)


async def _take_in(stage: Stage, transport: Transport) -> None:
    control, output = stage.control, stage.output
    await control.incoming(transport)
    assert control.arrival is not None
    waiting = f"waiting for a guest from {control.arrival.uri}"
    output.say(f"kvmmig: {waiting}")
    if transport.uri.scheme not in _ARRIVES_AT_ONCE:
        stage.runs(f"is {waiting}")
    await _arrived(stage)
    assert control.machine is not None
    if control.machine.state is not State.RUNNING:  # it was paused when it left
        await control.start()
    stage.runs()


async def _take_in_later(stage: Stage) -> None:
    control = stage.control
    control.defer()
    waiting = "waiting for a monitor's migrate-incoming"
    stage.output.say(f"kvmmig: {waiting}")
    stage.runs(f"is {waiting}")
    await control.wait_guest()
    await _arrived(stage)


async def _arrived(stage: Stage) -> None:
    arrival = await stage.control.wait_arrived()
    figures = arrival.figures
    machine = await stage.control.wait_guest()
    assert figures is not None
    for notice in arrival.notices:
        stage.output.say(f"kvmmig: {notice}")
    stage.output.say(
        f"kvmmig: the guest {machine.config.name!r} has arrived: {format_size(figures.received_bytes)}, "
        f"{figures.received_pages} pages and {figures.zero_pages} that are zero, in "
        f"{format_duration(figures.total_time or 0.0)}"
    )


async def _until_end(stage: Stage) -> int:
    return _exit_status(await stage.control.wait(), stage.output)


async def _leave(stage: Stage, transport: Transport, after: float) -> int:
    control, output = stage.control, stage.output
    try:
        with trio.move_on_after(after):
            ending = (await control.wait()).ending
            if ending is None:
                return FAILED
            raise GuestEnded(f"the guest ended before it was to move: {ending}")
        migration = stage.own_migration = control.migrate(transport)
        figures = await run_with_progress(migration, output, run=control.migration_ended)
    except OutcomeUnknown as error:
        output.say(f"kvmmig: {error}")
        await _ask_operator(stage)
    except KvmmigError as error:
        output.say(f"kvmmig: {error}")
        if control.run_state() == "running":
            output.say("kvmmig: the guest goes on running here")
    else:
        output.say(summary(figures))
        return 0
    await _until_end(stage)
    return FAILED


async def _tell_of_leaving(stage: Stage) -> None:
    """A guest that a monitor has moved leaves a machine behind, which somebody should know."""
    control, output = stage.control, stage.output
    machine = await control.wait_guest()
    while True:
        if (await machine.wait()).kind != "moved":
            return
        if control.migration is stage.own_migration:
            await control.wait_taken_back()
            continue
        try:
            figures = await control.migration_ended()
        except OutcomeUnknown as error:
            output.say(f"kvmmig: {error}")
            await _ask_operator(stage)
        else:
            output.say(
                f"kvmmig: the guest has moved to {figures.peer}; what is left of it here answers until "
                f'"kvmmig quit {control.name}", or Ctrl-C'
            )
            await control.wait_taken_back()


async def _ask_operator(stage: Stage) -> None:
    """Keep the guest, stopped, until somebody says that it does not run on the other side."""
    control = stage.control
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        stage.output.say(
            f"kvmmig: if it does not run there, kill -USR1 {os.getpid()} lets it go on here, as "
            f'"kvmmig resume {control.name} --force" does; if it does, Ctrl-C ends what is left of it here'
        )
        async with trio.open_nursery() as nursery:

            async def obey() -> None:
                async for _ in signals:
                    await control.take_back()

            nursery.start_soon(obey)
            await control.wait_taken_back()
            nursery.cancel_scope.cancel()
    stage.output.say("kvmmig: the guest goes on running here")


def _exit_status(outcome: Outcome, output: Output) -> int:
    """What the command says, and exits with, when the machine's life has ended so."""
    ending = outcome.ending
    if ending is None:
        return 0
    match ending.kind:
        case "exit":
            return ending.status
        case "crash":
            output.say(f"kvmmig: the guest crashed\n{ending.report}")
            return CRASHED
        case "moved":
            return 0
        case "reset" | "ended":
            output.say(f"kvmmig: the guest ended: {ending}")
            return 0
