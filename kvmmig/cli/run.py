"""``kvmmig run``: a guest's life on this side, from its load or its arrival to its end or its leaving."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.output import Output
from kvmmig.cli.programs import find_program
from kvmmig.cli.progress import Populating, run_with_progress, summary
from kvmmig.cli.serialport import SerialPort, open_serial
from kvmmig.cli.terminal import Keyboard
from kvmmig.errors import GuestEnded, KvmmigError, OutcomeUnknown, WrongState
from kvmmig.machine import Ending, Machine, MachineConfig, Program, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.registry import transport_for
from kvmmig.migration.transport import Transport
from kvmmig.units import format_duration, format_size

#: The exit status for a guest that crashed: EX_SOFTWARE of <sysexits.h>.
CRASHED = 70
FAILED = 1


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


def run_guest(guest: NewGuest, *, serial: str, leaving: Leaving | None) -> int:
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

    async def command() -> int:
        async with open_serial(serial) as port, _new_machine(config, program, port) as machine:
            await machine.start()
            if transport is None or leaving is None:
                return await _live(machine, port, lambda: _until_end(machine, port.output))
            return await _live(machine, port, lambda: _leave(machine, transport, leaving.after, port.output))

    return run_to_end(command)


def run_incoming(uri: str, *, serial: str) -> int:
    """Take a guest in and run it; returns the exit status. Raises `KvmmigError`."""
    transport = transport_for(uri)

    async def command() -> int:
        async with open_serial(serial) as port, _arriving_machine(transport, port) as machine:
            if machine.state is not State.RUNNING:  # it was paused when it left
                await machine.start()
            return await _live(machine, port, lambda: _until_end(machine, port.output))

    return run_to_end(command)


@asynccontextmanager
async def _new_machine(config: MachineConfig, program: Program, port: SerialPort) -> AsyncIterator[Machine]:
    async with Machine.open(
        config, output=port.output.serial, on_populate=Populating(port.output)
    ) as machine:
        await machine.load(program)
        yield machine


@asynccontextmanager
async def _arriving_machine(transport: Transport, port: SerialPort) -> AsyncIterator[Machine]:
    output = port.output
    async with await transport.listen() as listener:
        output.say(f"kvmmig: waiting for a guest from {listener.uri}")
        channel = await listener.accept()
    incoming = IncomingMigration(channel, output=output.serial, on_populate=Populating(output))
    async with incoming.machine() as machine:
        for notice in channel.notices:
            output.say(f"kvmmig: {notice}")
        output.say(
            f"kvmmig: the guest {machine.config.name!r} has arrived: {format_size(incoming.received_bytes)}, "
            f"{incoming.received_pages} pages and {incoming.zero_pages} that are zero, in "
            f"{format_duration(incoming.total_time or 0.0)}"
        )
        yield machine


async def _live(machine: Machine, port: SerialPort, story: Callable[[], Awaitable[int]]) -> int:
    """Let a person type at the guest while its story is told."""
    async with trio.open_nursery() as nursery:
        if port.keyboard is not None:
            nursery.start_soon(_type, port.keyboard, machine)
        status = await story()
        nursery.cancel_scope.cancel()
    return status


async def _type(keyboard: Keyboard, machine: Machine) -> None:
    with suppress(WrongState):  # nobody is left to be typed at
        await keyboard.feed(machine.feed)


async def _until_end(machine: Machine, output: Output) -> int:
    return _exit_status(await machine.wait(), output)


async def _leave(machine: Machine, transport: Transport, after: float, output: Output) -> int:
    try:
        with trio.move_on_after(after):
            ending = await machine.wait()
            raise GuestEnded(f"the guest ended before it was to move: {ending}")
        figures = await run_with_progress(OutgoingMigration(machine, transport), output)
    except OutcomeUnknown as error:
        output.say(f"kvmmig: {error}")
        await _ask_operator(machine, output)
        _exit_status(await machine.wait(), output)
        return FAILED
    except KvmmigError as error:
        output.say(f"kvmmig: {error}")
        if machine.state is State.RUNNING:
            output.say("kvmmig: the guest goes on running here")
        _exit_status(await machine.wait(), output)
        return FAILED
    output.say(summary(figures))
    return 0


async def _ask_operator(machine: Machine, output: Output) -> None:
    """Keep the guest, stopped, until somebody says that it does not run on the other side."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        output.say(
            f"kvmmig: if it does not run there, kill -USR1 {os.getpid()} lets it go on here; "
            "if it does, Ctrl-C ends what is left of it here"
        )
        async for _ in signals:
            break
    await machine.resume(force=True)
    output.say("kvmmig: the guest goes on running here")


def _exit_status(ending: Ending, output: Output) -> int:
    """What the command says, and exits with, when the guest has ended so."""
    match ending.kind:
        case "exit":
            return ending.status
        case "crash":
            output.say(f"kvmmig: the guest crashed\n{ending.report}")
            return CRASHED
        case "moved":
            return 0
        case "reset" | "stopped":
            output.say(f"kvmmig: the guest ended: {ending}")
            return 0
