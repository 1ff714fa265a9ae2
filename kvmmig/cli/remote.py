"""From a machine's name to its monitor: how every command but ``run`` controls a machine."""

from __future__ import annotations

import dataclasses
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgspec
import trio

from kvmmig.cli import rundir
from kvmmig.cli.holder import holder, is_free, send_signal
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import echo
from kvmmig.cli.statuses import command_line, status_of
from kvmmig.errors import ChannelBroken, ConnectFailed, KvmmigError
from kvmmig.migration.phases import PHASES
from kvmmig.migration.report import MigrationStatistics
from kvmmig.qmp.address import UnixAddress
from kvmmig.qmp.client import QMPClient

#: Seconds for a monitor's word, and for an end after SIGTERM: a process leaves at its own, shorter bound.
PATIENCE, TERM_TIME = 5.0, 15.0
_BY_SIGNAL = 128  # an exit status above it is a signal's
_AGAIN = 0.01  # seconds between two looks, or attempts to connect where others wait already


class NoSuchMachine(KvmmigError):
    """No machine of that name runs."""


class DoesNotAnswer(KvmmigError):
    """A machine's process is there, and its monitor says nothing."""

    def __init__(self, name: str, pid: int | None) -> None:
        process = f"process {pid}" if pid is not None else "whose process is not to be seen from here"
        super().__init__(
            f"the machine {name!r} ({process}) does not answer: it is stopped, very busy, or broken; "
            f"kvmmig quit {name} ends it"
        )


def no_such_machine(name: str) -> NoSuchMachine:
    """The error, with what can be done instead."""
    ended = f" (one that has ended left its last words: kvmmig logs {name})" if rundir.has_log(name) else ""
    running = [other for other in rundir.names() if other != name]
    hint = (
        f"these run: {', '.join(running)}"
        if running
        else f"none runs; start one with: kvmmig run dirtier --name {name} --detach"
    )
    return NoSuchMachine(f"there is no machine {name!r}{ended}; {hint}")


def not_there(name: str) -> NoSuchMachine | DoesNotAnswer:
    """The error for a machine that nobody can connect to, whether its process lives or not."""
    return no_such_machine(name) if is_free(name) else DoesNotAnswer(name, holder(name))


def _silent(name: str, error: ConnectFailed) -> KvmmigError:
    """The same for one that says nothing; ``error`` where it is no machine, but somebody's own monitor."""
    return error if is_free(name) else DoesNotAnswer(name, holder(name))


@asynccontextmanager
async def machine(name: str, *, timeout: float | None = None) -> AsyncIterator[QMPClient]:
    """A connection to a machine's monitor; ``timeout`` in seconds, `PATIENCE` where it is None.

    Raises `NoSuchMachine`, `WrongCommandLine` for what is no name, `DoesNotAnswer` where no monitor answers.
    """
    with command_line():
        rundir.check_name(name)
    address = UnixAddress(str(rundir.files_of(name).monitor))
    patience = PATIENCE if timeout is None else timeout
    async with AsyncExitStack() as stack:
        try:
            with trio.fail_after(patience):
                sock = await connected(rundir.connect_monitor, name)
            client = await stack.enter_async_context(QMPClient.connect(address, timeout=patience, sock=sock))
        except OSError as error:
            raise not_there(name) from error
        except trio.TooSlowError as error:
            raise _silent(name, ConnectFailed(f"{address} has not answered for {patience:g} s")) from error
        except ConnectFailed as error:
            raise _silent(name, error) from error
        yield client


async def connected(connect: Callable[[str], socket.socket | None], name: str) -> trio.socket.SocketType:
    """What ``connect(name)`` connects to, as soon as there is room for one more. Raises as it does."""
    await trio.lowlevel.checkpoint()
    while (sock := connect(name)) is None:  # noqa: ASYNC110 - no event says so
        await trio.sleep(_AGAIN)
    return trio.socket.from_stdlib_socket(sock)


def execute(name: str, command: str, arguments: Mapping[str, object] | None = None) -> int:
    """Have one QMP command carried out; returns 0. Raises `KvmmigError`."""

    async def ask() -> int:
        async with machine(name) as client:
            await client.execute(command, arguments)
        return 0

    return run_to_end(ask)


def for_each(names: Sequence[str], command: Callable[[str], int]) -> int:
    """Run a command for each machine; the worst of its statuses. What fails for one is said of that one.

    Raises what it raises where there is but one machine.
    """
    if len(names) == 1:
        return command(names[0])
    worst = 0
    for name in names:
        try:
            status = command(name)
        except KvmmigError as error:
            echo(f"kvmmig: {error}", err=True)
            status = status_of(error)
        worst = max(worst, status)
        if status > _BY_SIGNAL:
            break
    return worst


def quit_machine(name: str) -> int:
    """End a machine, and wait until it is gone; returns 0. Raises `KvmmigError`.

    One whose monitor does not do it is ended by SIGTERM, and by SIGKILL after `TERM_TIME`; it says so.
    """

    async def ask() -> int:
        try:
            async with machine(name) as client:
                with trio.move_on_after(PATIENCE) as scope:
                    await _tell_quit(client)
            if not scope.cancelled_caught and await _gone(name, TERM_TIME):
                return 0
            raise DoesNotAnswer(name, holder(name))
        except DoesNotAnswer:
            if not await _end_by_signals(name):
                raise
        await trio.to_thread.run_sync(rundir.clean)
        return 0

    return run_to_end(ask)


async def end_machine(client: QMPClient, name: str) -> None:
    """End a machine, and wait until it is gone. A cancel leaves it ending."""
    await _tell_quit(client)
    await trio.to_thread.run_sync(rundir.wait_for_end, name, abandon_on_cancel=True)


async def _tell_quit(client: QMPClient) -> None:
    with suppress(ChannelBroken):  # it may be gone before its reply is here
        await client.execute("quit")


async def _end_by_signals(name: str) -> bool:
    """Have the kernel end the process that has a name, and say how; False when there is none to be seen."""
    for number, time in ((signal.SIGTERM, TERM_TIME), (signal.SIGKILL, PATIENCE)):
        pid = send_signal(name, number)
        if pid is None:
            return await _gone(name, 0)
        if await _gone(name, time):
            echo(f"kvmmig: {name!r} did not answer: {number.name} has ended its process {pid}", err=True)
            return True
        without = f"{number.name} to its process {pid} has not ended it in {time:g} s"
        echo(f"kvmmig: {name!r} did not answer, and {without}", err=True)
    return False


async def _gone(name: str, time: float) -> bool:
    """Whether nobody has the name any more, now or within ``time`` seconds."""
    with trio.move_on_after(time):
        while not is_free(name):  # noqa: ASYNC110 -- the kernel tells nobody
            await trio.sleep(_AGAIN)
    return is_free(name)


async def migration_figures(client: QMPClient) -> tuple[MigrationStatistics | None, dict[str, Any]]:
    """A machine's present or last migration, None before the first one; and the JSON that says so."""
    reply: dict[str, Any] = await client.execute("x-kvmmig-query-migration")
    return (figures_of(reply) if reply else None), reply


def figures_of(reply: Mapping[str, Any]) -> MigrationStatistics:
    """The figures of a migration, as a monitor's reply or event has them."""
    fields = {name: value for name, value in reply.items() if name != "counters"}
    figures = msgspec.convert(_snake_case(fields), MigrationStatistics)
    # A counter's name is the channel's own.
    return dataclasses.replace(figures, counters=reply.get("counters", {}))


def has_ended(figures: MigrationStatistics) -> bool:
    """There is nothing more to come."""
    return PHASES[figures.phase].is_end


def _snake_case(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.replace("-", "_"): _snake_case(item) for key, item in value.items()}
    return [_snake_case(item) for item in value] if isinstance(value, list) else value
