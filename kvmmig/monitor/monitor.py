"""A monitor for a machine that a Python program has opened."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Self

import trio

import kvmmig
from kvmmig.errors import KvmmigError, MigrationError
from kvmmig.machine import Machine
from kvmmig.migration.policy import Limits, Policy
from kvmmig.migration.report import MigrationStatistics
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import QMPServer
from kvmmig.qmp.address import parse_address
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.transport.toolkit import own_tasks
from kvmmig.units import parse_bandwidth

_log = logging.getLogger("kvmmig.monitor")


class Monitor:
    """Serves QMP for one machine, at any number of addresses, as long as the block lasts.

    >>> async with kvmmig.open_machine("dirtier", memory="8MiB", settings={"hot": "1MiB"}) as machine:
    ...     async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor:
    ...         await machine.start()
    ...         async with kvmmig.QMPClient.connect(monitor.addresses[0]) as client:
    ...             print(await client.execute("query-status"))
    {'status': 'running', 'running': True}

    Its clients may do all that `docs/monitor.md` lists; ``quit`` ends the guest, and leaves it to the program
    to end. They see a migration by `migrate`, and may cancel it; of one by `kvmmig.migrate` they know
    nothing. They are told whenever the guest pauses or runs, whoever had it do so. A migration that they have
    begun is cancelled at the end of the block.
    """

    def __init__(self, machine: Machine | MachineControl, *addresses: str) -> None:
        """``addresses`` are ``unix:PATH`` or ``tcp:HOST:PORT``. Raises `BadURI`."""
        self._machine = machine
        self._wanted = [parse_address(address) for address in addresses]
        self._serving: AbstractAsyncContextManager[None]
        #: Where it listens, with the ports that the kernel chose; empty before the block.
        self.addresses: tuple[str, ...] = ()
        #: What its clients control the machine by, for the program to do the same.
        self.control: MachineControl

    async def __aenter__(self) -> Self:
        """Listen. Raises `ConnectFailed`."""
        self._serving = self._serve()
        await self._serving.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._serving.__aexit__(kind, error, traceback)

    async def migrate(
        self,
        to: str | TransportURI | Transport,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        bandwidth: float | str | None = None,
    ) -> MigrationStatistics:
        """Move the guest as `kvmmig.migrate` does, by a migration that its clients see and may cancel.

        What is not said here is as they have set it. Raises as `kvmmig.migrate` does, and `WrongState` while
        another migration runs that was begun here or by them. A cancel cancels the migration.
        """
        rate = parse_bandwidth(bandwidth)
        transport = to if isinstance(to, Transport) else await trio.to_thread.run_sync(transport_for, to)
        outgoing = self.control.outgoing
        migration = outgoing.begin(transport, policy=policy, limits=limits)
        if rate is not None:
            migration.set_bandwidth(rate)
        try:
            return await outgoing.wait()
        except trio.Cancelled:
            with suppress(
                MigrationError
            ):  # the guest has been handed over: nothing to cancel, or to wait for
                outgoing.cancel("it was cancelled by the program that began it")
                with trio.CancelScope(shield=True), suppress(KvmmigError):
                    await outgoing.wait()
            raise

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[None]:
        async with _control_of(self._machine) as self.control, own_tasks() as nursery:
            version = f"kvmmig {kvmmig.__version__}"
            server = QMPServer(commands_for(self.control), version=version, notices=_log.warning)
            self.control.subscribe(server.emit)
            self.addresses = tuple([await nursery.start(server.serve, one) for one in self._wanted])
            yield


@asynccontextmanager
async def _control_of(machine: Machine | MachineControl) -> AsyncIterator[MachineControl]:
    if isinstance(machine, MachineControl):
        yield machine
        return
    async with MachineControl.open(name=machine.config.name) as control, own_tasks() as nursery:
        control.adopt(machine)
        nursery.start_soon(_obey_quit, control, machine)
        yield control


async def _obey_quit(control: MachineControl, machine: Machine) -> None:
    if (await control.wait()).ending is not None:
        return
    with suppress(MigrationError):  # the other side has the guest already
        control.outgoing.cancel("the machine was told to quit")
    with suppress(KvmmigError):
        await control.outgoing.wait()
    await machine.end()
