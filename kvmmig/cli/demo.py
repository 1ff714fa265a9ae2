"""``kvmmig demo``: three real migrations in under a minute, with proof that no page was lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Self

import msgspec
import trio

from kvmmig.cli.bare_loop import BareLoop
from kvmmig.cli.demo_peer import Failure, Letters, Listening, Message, Result
from kvmmig.cli.demo_table import VERIFIED, Case, Row, print_table, row_as_json, stopped_for
from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.cli.lifetime import run_to_end, the_error
from kvmmig.cli.logs import logging_to
from kvmmig.cli.output import Output
from kvmmig.cli.printing import echo, echo_json
from kvmmig.cli.progress import run_with_progress
from kvmmig.cli.scheduling import ask_for_short_slices
from kvmmig.cli.statuses import WrongCommandLine, command_line
from kvmmig.errors import BadConfig, KvmmigError, MachineError, MigrationError
from kvmmig.guests import Check, check_machine, find
from kvmmig.machine import Machine, MachineConfig, State
from kvmmig.machine.config import available_memory
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.transport import TransportURI, transport_for
from kvmmig.units import format_size

_HOT = 64 << 20
_HOT_SHARE = 8  # of a small guest's memory at most an eighth is hot
_FILL_TIME = 60.0  # seconds that a guest may take to fill its memory and check it once
_SPARE_MEMORY = 512 << 20
_SPARE_DISK = 64 << 20
_SHOWN_LETTERS = 40


def run_demo(*, memory: int, directory: str, as_json: bool) -> int:
    """Run the demo; 0 when every move was verified, else 1. Raises `KvmmigError` where it can't begin.

    With ``as_json`` standard output gets the figures only, and all else goes to standard error.
    """
    _check_room(memory, directory)
    forced_exit = ForcedExit()

    async def command() -> int:
        ask_for_short_slices()
        async with Output(messages=2 if as_json else 1) as output, BareLoop.start() as loop:
            with (
                logging_to(output.say),
                _scratch(directory) as scratch,
                forced_exit.before(partial(shutil.rmtree, scratch, ignore_errors=True)),
                forced_exit.before(output.drain_briefly),
            ):
                rows = await _demo(memory, scratch, output, loop)
        if as_json:
            echo_json([row_as_json(row) for row in rows], indent=True)
        else:
            echo("")
            print_table(rows)
        return 0 if all(row.verdict == VERIFIED for row in rows) else 1

    return run_to_end(command, forced_exit=forced_exit)


def _check_room(memory: int, directory: str) -> None:
    if not os.path.isdir(directory):
        raise WrongCommandLine(f"--directory {directory}: there is no such directory; name one on a disk")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise WrongCommandLine(f"--directory {directory}: you may not write there; name another one")
    with command_line():
        MachineConfig(memory=memory)
    available, wanted = available_memory(), 2 * memory + _SPARE_MEMORY
    if available < wanted:
        raise BadConfig(
            f"the demo needs {format_size(wanted)} of memory, for two guests of {format_size(memory)} at a "
            f"time, and this host has {format_size(available)} available; use a smaller --memory"
        )
    free, wanted = free_space(directory), memory + memory // 4 + _SPARE_DISK
    if free < wanted:
        raise BadConfig(
            f"the demo needs {format_size(wanted)} of disk space in {directory}, where {format_size(free)} "
            "are free; use another --directory or a smaller --memory"
        )


def free_space(directory: str) -> int:
    """Bytes that can still be written in a directory."""
    return shutil.disk_usage(directory).free


def _scratch(directory: str) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="kvmmig-demo-", dir=directory, ignore_cleanup_errors=True)
    except OSError as error:
        raise WrongCommandLine(f"--directory {directory}: {error.strerror}; name another one") from error


async def _demo(memory: int, scratch: str, output: Output, loop: BareLoop) -> list[Row]:
    piped, filed = os.path.join(scratch, "pipe.img"), os.path.join(scratch, "file.img")
    cases = (
        Case(
            "tcp",
            "moves to another process over TCP, while it runs",
            TransportURI("tcp", "127.0.0.1:0"),
        ),
        Case(
            "pipe + helper",
            "is saved through a pipe to a helper process that writes with O_DIRECT, and comes back",
            TransportURI("pipe", piped, {"direct": "on"}),
            piped,
        ),
        Case(
            "file", "is saved to a file by worker threads, and comes back", TransportURI("file", filed), filed
        ),
    )
    output.say(
        f"Three guests of {format_size(memory)} each, one after the other. Each rewrites "
        f"{format_size(_hot(memory))} of its memory\nflat out, checks every page as it goes, and prints a "
        "letter whenever it has checked them all."
    )
    rows = []
    for number, case in enumerate(cases, 1):
        output.say(f"\n{number}. The guest {case.description}.")
        row = Row(case)
        try:
            await _migrate(row, memory, output, loop)
        except (KvmmigError, BaseExceptionGroup) as problem:
            error = the_error(problem)
            if not isinstance(error, KvmmigError):
                raise
            row.verdict = f"FAILED: {error}"
        rows.append(row)
        output.say(f"   {row.verdict}")
    return rows


async def _migrate(row: Row, memory: int, output: Output, loop: BareLoop) -> None:
    case = row.case
    async with _busy_guest(memory, output) as machine:
        if case.saved:
            await _send(row, machine, case.uri, output, loop)
            source = await _check(machine)
        else:
            async with _Peer.start(case.uri) as peer:
                await _send(row, machine, await peer.listening(), output, loop)
                source = await _check(machine)
                result = await peer.result()
    if case.saved:
        output.say(
            f"   saved: {format_size(os.stat(case.saved).st_size)}, the guest was stopped for "
            f"{stopped_for(row)}; now it comes back in another process"
        )
        async with _Peer.start(case.uri) as peer:
            await peer.listening()
            result = await peer.result()
        os.unlink(case.saved)
    row.pages, row.passes = result.pages, f"{result.passes_before} -> {result.passes_after}"
    output.say(
        f"   it went on there from pass {result.passes_before} to pass {result.passes_after}, and printed: "
        f"{''.join(result.letters.split())[:_SHOWN_LETTERS]}"
    )
    faults = [f"at the source: {fault}" for fault in source.faults] + result.faults
    if faults:
        row.verdict = f"FAILED: {faults[0]}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "")
    elif result.pages != source.pages:
        row.verdict = f"FAILED: {result.pages} pages were verified there, and the guest has {source.pages}"


@asynccontextmanager
async def _busy_guest(memory: int, output: Output) -> AsyncIterator[Machine]:
    """A dirtier that has filled its memory and checked all of it once."""
    program = find("dirtier").program(memory=memory, cpus=1, settings={"hot": _hot(memory)})
    config = MachineConfig(memory=memory, name=program.name, parameters=program.parameters)
    letters = Letters(1)
    async with Machine.open(config, output=letters.add) as machine:
        await machine.load(program)
        await machine.start()
        with trio.move_on_after(_FILL_TIME) as scope:
            await letters.enough.wait()
        if scope.cancelled_caught:
            raise MachineError(f"the guest did not fill its memory within {_FILL_TIME:g} s")
        if machine.state is not State.RUNNING:
            raise MachineError(f"the guest ended before it was to move: {letters.text.strip()}")
        yield machine


async def _send(row: Row, machine: Machine, uri: TransportURI, output: Output, loop: BareLoop) -> None:
    migration = OutgoingMigration(machine, transport_for(uri))
    await loop.worst()  # what was before does not count
    try:
        await run_with_progress(migration, output, indent="   ")
    finally:
        row.figures = migration.statistics()
    row.bare_loop = await loop.worst()


async def _check(machine: Machine) -> Check:
    found = await trio.to_thread.run_sync(check_machine, machine)
    assert found is not None  # the host knows how to check a dirtier
    return found


def _hot(memory: int) -> int:
    return min(_HOT, memory // _HOT_SHARE)


class _Peer:
    """The process on the other side, killed at the end of the block if it still lives."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = b""

    @classmethod
    @asynccontextmanager
    async def start(cls, uri: TransportURI) -> AsyncIterator[Self]:
        command = [sys.executable, "-m", "kvmmig.cli.demo_peer", str(uri)]
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(
                    trio.run_process, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
                )
            )
            yield cls(process)
            nursery.cancel_scope.cancel()

    async def listening(self) -> TransportURI:
        """The URI to connect to. Raises `MigrationError` when it can't listen."""
        message = await self._message()
        assert isinstance(message, Listening)
        return TransportURI.parse(message.uri)

    async def result(self) -> Result:
        """What it found. Raises `MigrationError` when the guest did not arrive."""
        message = await self._message()
        assert isinstance(message, Result)
        return message

    async def _message(self) -> Listening | Result:
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._received:
            data = await stdout.receive_some()
            if not data:
                status = await self._process.wait()
                raise MigrationError(f"the other process ended without a result, with status {status}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: Message = msgspec.json.decode(line, type=Message)
        if isinstance(message, Failure):
            raise MigrationError(f"the other process says: {message.text}")
        return message
