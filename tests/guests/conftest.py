"""A toy guest that runs, and what it has printed so far."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from kvmmig.guests import ToyGuest, find
from kvmmig.machine import Machine, MachineConfig, Program


class Screen:
    """What a guest has printed. Condition-based waiting, no polling."""

    def __init__(self) -> None:
        self.text = ""
        self._token = trio.lowlevel.current_trio_token()
        self._changed = trio.Event()

    def output(self, data: bytes) -> None:
        """For `Machine.open`: called in vCPU threads."""
        self._token.run_sync_soon(self._add, data)

    async def until(self, condition: Callable[[str], object]) -> str:
        """Wait until what was printed fulfils the condition."""
        while not condition(self.text):
            await self._changed.wait()
        return self.text

    def _add(self, data: bytes) -> None:
        self.text += data.decode("latin-1")
        self._changed.set()
        self._changed = trio.Event()


class Running:
    """A machine that runs a toy guest."""

    def __init__(self, machine: Machine, screen: Screen, program: Program) -> None:
        self.machine = machine
        self.screen = screen
        self.program = program


Run = Callable[..., AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def run_guest(
    guest: str | ToyGuest,
    *,
    memory: int = 16 << 20,
    cpus: int = 1,
    before_start: Callable[[Machine], None] | None = None,
    **settings: int | str,
) -> AsyncIterator[Running]:
    toy = find(guest) if isinstance(guest, str) else guest
    program = toy.program(memory=memory, cpus=cpus, settings=settings)
    screen = Screen()
    config = MachineConfig(memory=memory, cpus=cpus, name=program.name, parameters=program.parameters)
    with trio.fail_after(60):
        async with Machine.open(config, output=screen.output) as machine:
            await machine.load(program)
            if before_start is not None:
                before_start(machine)
            await machine.start()
            yield Running(machine, screen, program)


@pytest.fixture
def run() -> Run:
    """``async with run("dirtier", memory=..., hot=...) as running``: start a toy guest, and close it."""
    return run_guest


@asynccontextmanager
async def machine_with(program: Program, memory: int, screen: Screen) -> AsyncIterator[Machine]:
    """A machine with this program in it, to be started."""
    async with Machine.open(MachineConfig(memory=memory, name=program.name), output=screen.output) as machine:
        await machine.load(program)
        yield machine


Move = Callable[[Running], AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def move_guest(old: Running) -> AsyncIterator[Running]:
    sections = await old.machine.capture()
    screen = Screen()
    async with Machine.open(
        old.machine.config, output=screen.output, description=old.machine.description
    ) as machine:
        machine.memory.words[:] = old.machine.memory.words
        await machine.apply(sections)
        await machine.start()
        yield Running(machine, screen, old.program)


@pytest.fixture
def move() -> Move:
    """``async with move(running) as moved``: a paused guest goes on in a second machine."""
    return move_guest
