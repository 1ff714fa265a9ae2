"""A monitor for a machine that a Python program has opened."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import kvmmig
from kvmmig.errors import KvmmigError, MigrationError, WrongState
from kvmmig.machine import Machine
from kvmmig.qmp.address import parse_address
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.nursery import background
from kvmmig.qmp.server import MonitorServer

_log = logging.getLogger("kvmmig.monitor")
_controls: WeakKeyDictionary[Machine, MachineControl] = WeakKeyDictionary()


class Monitor:
    """Serves QMP for one machine, at any number of addresses, as long as the block lasts.

    >>> async with kvmmig.open_machine("dirtier", memory="8MiB", settings={"hot": "1MiB"}) as machine:
    ...     async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor:
    ...         await machine.start()
    ...         async with kvmmig.QMPClient.connect(monitor.addresses[0]) as client:
    ...             print(await client.execute("query-status"))
    {'status': 'running', 'running': True}

    Its clients may do all that `docs/monitor.md` lists; ``quit`` stops the guest, and leaves it to the
    program to end. A migration by `kvmmig.migrate` is seen and may be cancelled by them. They are told of
    pauses and starts that come from them, from migrations, and from `control`; a program that calls
    `Machine.pause` itself tells nobody. A migration that they have begun is cancelled at the end of the
    block.
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
        """Listen. Raises `ConnectFailed`, and `WrongState` where the machine has a monitor already."""
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

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[None]:
        async with _control_of(self._machine) as self.control, background() as nursery:
            server = MonitorServer(
                commands_for(self.control), version=kvmmig.__version__, notices=_log.warning
            )
            self.control.subscribe(server.emit)
            self.addresses = tuple([await nursery.start(server.serve, one) for one in self._wanted])
            yield


def control_over(machine: Machine) -> MachineControl | None:
    """What a `Monitor` controls this machine by; None where there is none."""
    return _controls.get(machine)


@asynccontextmanager
async def _control_of(machine: Machine | MachineControl) -> AsyncIterator[MachineControl]:
    if isinstance(machine, MachineControl):
        yield machine
        return
    if machine in _controls:  # two that know nothing of each other could both migrate it
        raise WrongState(
            f"the machine {machine.config.name!r} has a monitor already; give that one all addresses"
        )
    async with MachineControl.open(name=machine.config.name) as control, background() as nursery:
        control.adopt(machine)
        _controls[machine] = control
        try:
            nursery.start_soon(_obey_quit, control, machine)
            yield control
        finally:
            del _controls[machine]


async def _obey_quit(control: MachineControl, machine: Machine) -> None:
    if (await control.wait()).ending is not None:
        return
    with suppress(MigrationError):  # the other side has the guest already
        control.cancel("the machine was told to quit")
    with suppress(KvmmigError):
        await control.migration_ended()
    await machine.stop()
