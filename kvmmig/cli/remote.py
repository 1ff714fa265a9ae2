"""From a machine's name to its monitor: how every command but ``run`` controls a machine."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import trio

from kvmmig.cli import rundir
from kvmmig.cli.lifetime import run_to_end
from kvmmig.errors import ChannelBroken, ConnectFailed, KvmmigError
from kvmmig.migration.phases import PHASES
from kvmmig.migration.report import MigrationStatistics
from kvmmig.qmp.address import UnixAddress
from kvmmig.qmp.client import QMPClient

_AGAIN = 0.01  # seconds between two attempts to connect where others wait already


class NoSuchMachine(KvmmigError):
    """No machine of that name runs."""


def no_such_machine(name: str) -> NoSuchMachine:
    """The error, with what can be done instead."""
    log = rundir.files_of(name).log
    ended = f" (one that has ended left its last words in {log})" if rundir.has_log(name) else ""
    running = [other for other in rundir.names() if other != name]
    hint = (
        f"these run: {', '.join(running)}"
        if running
        else f"none runs; start one with: kvmmig run dirtier --name {name} --detach"
    )
    return NoSuchMachine(f"there is no machine {name!r}{ended}; {hint}")


@asynccontextmanager
async def machine(name: str, *, timeout: float = 5.0) -> AsyncIterator[QMPClient]:
    """A connection to a machine's monitor; ``timeout`` in seconds.

    Raises `NoSuchMachine`, `BadConfig` for what is no name, `ConnectFailed` where no monitor answers.
    """
    rundir.check_name(name)
    address = UnixAddress(str(rundir.files_of(name).monitor))
    try:
        with trio.move_on_after(timeout) as scope:
            sock = await connected(rundir.connect_monitor, name)
    except OSError as error:
        raise no_such_machine(name) from error
    if scope.cancelled_caught:
        raise ConnectFailed(f"the monitor at {address} has not answered for {timeout:g} s")
    async with QMPClient.connect(address, timeout=timeout, sock=sock) as client:
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


def quit_machine(name: str) -> int:
    """End a machine, and wait until it is gone; returns 0. Raises `KvmmigError`."""

    async def ask() -> int:
        async with machine(name) as client:
            await end_machine(client, name)
        return 0

    return run_to_end(ask)


async def end_machine(client: QMPClient, name: str) -> None:
    """End a machine, and wait until it is gone. A cancel leaves it ending."""
    with suppress(ChannelBroken):  # it may be gone before its reply is here
        await client.execute("quit")
    await trio.to_thread.run_sync(rundir.wait_for_end, name, abandon_on_cancel=True)


async def migration_figures(client: QMPClient) -> tuple[MigrationStatistics | None, dict[str, Any]]:
    """A machine's present or last migration, None before the first one; and the JSON that says so."""
    reply: dict[str, Any] = await client.execute("x-kvmmig-query-migration")
    if not reply:
        return None, reply
    fields = {name: value for name, value in reply.items() if name != "counters"}
    figures = msgspec.convert(_snake_case(fields), MigrationStatistics)
    # A counter's name is the channel's own.
    return dataclasses.replace(figures, counters=reply.get("counters", {})), reply


def has_ended(figures: MigrationStatistics) -> bool:
    """There is nothing more to come."""
    return PHASES[figures.phase].is_end


def _snake_case(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.replace("-", "_"): _snake_case(item) for key, item in value.items()}
    return [_snake_case(item) for item in value] if isinstance(value, list) else value
