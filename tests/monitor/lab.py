"""A machine under control, and somebody who gives it commands, without a socket between them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from kvmmig import guests
from kvmmig.machine import MachineConfig
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.events import EVENTS
from kvmmig.qmp import Session

MIB = 1 << 20
PATIENCE = 60.0  # seconds for anything; a test that needs nearly so many has failed


class Lab:
    """A machine's control, its commands as one client gives them, and what it has told."""

    def __init__(self, control: MachineControl) -> None:
        self.control = control
        self.table = commands_for(control)
        self.session = Session()
        self.session.negotiated = True
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        control.subscribe(self._note)

    def _note(self, event: str, data: Mapping[str, Any]) -> None:
        needed = {name for name in EVENTS[event] if not name.startswith("*")}
        known = {name.removeprefix("*") for name in EVENTS[event]}
        assert needed <= set(data) <= known, "query-qmp-schema describes it"
        self.events.append((event, data))

    async def __call__(self, command: str, **arguments: object) -> Any:
        """Carry a command out, through JSON both ways; ``_`` in an argument's name is ``-``."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = await self.table.execute(self.session, command, msgspec.json.encode(given))
        return msgspec.json.decode(msgspec.json.encode(reply if reply is not None else {}))

    @property
    def named(self) -> list[str]:
        """The events' names, and the statuses of migrations in their place."""
        return [str(data["status"]) if name == "MIGRATION" else name for name, data in self.events]

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():  # noqa: ASYNC110 -- it polls as a client does
                await trio.sleep(0.001)

    async def until_status(self, *wanted: str) -> dict[str, Any]:
        """Ask query-migrate until it says one of these, as clients do; its reply then."""
        with trio.fail_after(PATIENCE):
            while True:
                info: dict[str, Any] = await self("query-migrate")
                if info.get("status") in wanted:
                    return info
                ended = info.get("status") in ("completed", "failed", "cancelled")
                assert not ended, f"{info} instead of {wanted}"
                await trio.sleep(0.001)


@asynccontextmanager
async def running(
    guest: str = "dirtier", *, size: int = 16 * MIB, cpus: int = 1, **settings: str
) -> AsyncIterator[Lab]:
    """A toy guest under control, running."""
    if guest == "dirtier":
        settings.setdefault("hot", "1MiB")
    program = guests.find(guest).program(memory=size, cpus=cpus, settings=settings)
    config = MachineConfig(memory=size, cpus=cpus, name=program.name, parameters=program.parameters)
    async with MachineControl.open(name=f"the-{guest}") as control:
        lab = Lab(control)
        await control.load(config, program)
        await control.resume()
        yield lab


@asynccontextmanager
async def awaiting(name: str = "there") -> AsyncIterator[Lab]:
    """Where a guest may arrive."""
    async with MachineControl.open(name=name) as control:
        control.incoming.defer()
        yield Lab(control)


async def listening(lab: Lab, uri: str = "tcp:127.0.0.1:0") -> str:
    """Have a guest awaited there; the URI for its source."""
    await lab("migrate-incoming", uri=uri)
    return str(lab.control.incoming.uri)


def pass_fd(lab: Lab, name: str, fd: int) -> None:
    """As a client does with getfd and SCM_RIGHTS; ``fd`` itself stays the caller's."""
    lab.session.receive_fds([os.dup(fd)])
    lab.session.name_fd(name)


async def check(control: MachineControl) -> None:
    """The dirtier's memory is what it must be."""
    machine = control.machine
    assert machine is not None
    await machine.pause()
    result = await trio.to_thread.run_sync(guests.check_machine, machine)
    assert result is not None
    assert result.ok, result.summary
