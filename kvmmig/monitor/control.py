"""One machine under control: all that a monitor, or a command, can do to it goes through here.

What may be done when is the table in `kvmmig.monitor.life`; what happens is told as QEMU's events.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Self

import trio

from kvmmig.errors import KvmmigError
from kvmmig.machine import Ending, Machine, MachineConfig, Program, State
from kvmmig.machine.populating import Reserve
from kvmmig.monitor.dirty_rate import DirtyRate
from kvmmig.monitor.events import Events, Listener
from kvmmig.monitor.incoming import Incoming
from kvmmig.monitor.life import NOT_MOVED, Life
from kvmmig.monitor.outgoing import Outgoing
from kvmmig.monitor.parameters import MigrationSettings
from kvmmig.monitor.states import run_state, run_state_at_end
from kvmmig.monitor.tasks import outliving
from kvmmig.transport.toolkit import own_tasks


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine's life under control ended: the guest's own ``ending``, or None where it was `quit`."""

    ending: Ending | None = None


class MachineControl:
    """One machine and what can be done to it. Made by `open`; not thread-safe.

    Every refusal is a `KvmmigError` whose text is for the person who asked, and changes nothing.
    """

    def __init__(
        self,
        life: Life,
        *,
        output: Callable[[bytes], None] | None,
        reserve: Reserve | None,
        stack: AsyncExitStack,
        machines: trio.Nursery,
        nursery: trio.Nursery,
        strays: trio.Nursery,
    ) -> None:
        """Use `open`."""
        self._life = life
        self._events = Events(life, settings := MigrationSettings())
        #: Parameters, capabilities and policy of its migrations.
        self.settings = settings
        #: How fast the guest writes: the last measurement, and the present one.
        self.dirty_rate = DirtyRate(life, nursery)
        #: The migration away from here: the present one, or the last one.
        self.outgoing = Outgoing(
            life, settings, self._events, self.dirty_rate, nursery=nursery, strays=strays
        )
        #: The guest that is to come, or has come, by migration.
        self.incoming = Incoming(
            life,
            settings,
            self._events,
            output=output,
            reserve=reserve,
            limits=settings.limits,
            on_here=self._adopt,
            on_failure=self._fail,
            machines=machines,
            strays=strays,
        )
        self._output = output
        self._stack = stack
        self._nursery = nursery
        self._here = trio.Event()
        self._taken_back = trio.Event()
        self._over = trio.Event()
        self._outcome = Outcome()
        self._failure: KvmmigError | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        *,
        name: str,
        output: Callable[[bytes], None] | None = None,
        reserve: Reserve | None = None,
        guest_follows: bool = False,
    ) -> AsyncIterator[Self]:
        """Control a machine called ``name``; at the end of the block all of it is taken down.

        ``output`` gets what the guest sends to its serial port, in vCPU threads, and must not block.
        ``reserve`` is memory for the first guest that comes by migration; whoever made it closes it. With
        ``guest_follows`` what is asked of the guest waits for `load`, or for `incoming` to listen or to be
        deferred: a client may be there before them. A migration that runs when the block is left is cancelled
        first, so its other side gets no guest.
        """
        async with (
            outliving() as strays,
            outliving() as machines,
            AsyncExitStack() as stack,
            own_tasks() as nursery,  # a migration ends before its machine goes
        ):
            yield cls(
                Life(name, guest_follows=guest_follows),
                output=output,
                reserve=reserve,
                stack=stack,
                machines=machines,
                nursery=nursery,
                strays=strays,
            )

    @property
    def name(self) -> str:
        """What its clients are told that it is called."""
        return self._life.name

    @property
    def machine(self) -> Machine | None:
        """None until a guest has been loaded, or has arrived."""
        return self._life.machine

    def run_state(self) -> str:
        """What the machine does, by QEMU's names of run states."""
        if self._outcome.ending is not None:
            return run_state_at_end(self._outcome.ending)
        return run_state(
            self.machine,
            incoming=self._life.awaits or self.incoming.status == "completed",
            phase=self.outgoing.phase if self.outgoing.active else None,
        )

    def subscribe(self, listener: Listener) -> None:
        """Tell ``listener`` of every event, on the event loop: its QMP name and its data.

        STOP, RESUME, RESET, POWERDOWN, SHUTDOWN, GUEST_PANICKED; MIGRATION and MIGRATION_PASS while the
        capability ``events`` is on.
        """
        self._events.subscribe(listener)

    # -- its guest ----------------------------------------------------------------------------------

    async def load(self, config: MachineConfig, program: Program, *, start: bool = False) -> None:
        """Build a machine with a program in it, ready to be started, or started at once.

        What is asked of the guest meanwhile waits: a client may be there before it. Raises `BadConfig`,
        `BadImage`, `KvmError`; `WrongState` where there is a machine already.
        """
        self._life.enter("load")
        try:
            async with AsyncExitStack() as stack:
                machine = await stack.enter_async_context(Machine.open(config, output=self._output))
                await machine.load(program)
                if start:
                    await machine.start()
                self._stack.push_async_exit(stack.pop_all())
        except BaseException:
            self._life.happened("not loaded")
            raise
        self._life.happened("loaded")
        self._adopt(machine)

    def adopt(self, machine: Machine) -> None:
        """Control a machine that somebody else has opened, and will close after this control.

        Raises `WrongState` where there is a machine already.
        """
        self._life.enter("adopt")
        self._adopt(machine)

    async def settled(self) -> None:
        """Wait while the guest is about to be loaded, or to be listened for."""
        await self._life.settled()

    async def wait_guest(self) -> Machine:
        """Wait until there is a machine: loaded, or arrived. Raises as `wait` does."""
        await self._here.wait()
        if self.machine is None:
            assert self._failure is not None
            raise self._failure
        return self.machine

    async def pause(self) -> None:
        """Pause the guest; all its vCPUs stand still when this returns. No effect on one that does already.

        Raises `WrongState` while a migration hands it over, and for one that has moved away or has ended.
        """
        await self.settled()
        machine = self._life.guest("pause")
        if machine.state is not State.CREATED:
            await machine.pause()

    async def resume(self) -> None:
        """Let the guest run, for the first time or again. No effect on one that runs.

        Raises `WrongState` while a migration hands it over, and for one that has moved away: see `take_back`.
        """
        await self.settled()
        await self._life.guest("resume").start()

    async def take_back(self) -> None:
        """Let a guest that has moved away run here again: the word of an operator who has looked there.

        Two that run at once would both write to the world. Raises `WrongState` unless it has moved.
        """
        machine = self._life.guest("take back")
        if machine.state is not State.MOVED:
            raise self._life.refusal(NOT_MOVED)
        await machine.resume(force=True)
        self._taken_back.set()
        self._taken_back = trio.Event()

    async def wait_taken_back(self) -> None:
        """Wait until the next `take_back`."""
        await self._taken_back.wait()

    async def reset(self) -> None:
        """Let the guest begin again as it was loaded, running or paused as before.

        Raises `WrongState` while a migration runs, and for a guest that has come by migration.
        """
        await self.settled()
        machine = self._life.guest("reset")
        self._life.enter("reset")
        try:
            await self.dirty_rate.end()
            await machine.reset()
        finally:
            self._life.happened("reset is over")
        self._events.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def power_down(self) -> None:
        """Press the power button. There is no ACPI here, so it is up to the clients that are told of it."""
        self._events.emit("POWERDOWN", {})

    # -- its end ------------------------------------------------------------------------------------

    def quit(
        self, *, reason: Literal["host-qmp-quit", "host-signal", "host-error"] = "host-qmp-quit"
    ) -> None:
        """End the machine's life: `wait` returns. Whoever waits leaves the block of `open`."""
        if not self._over.is_set():
            self._events.emit("SHUTDOWN", {"guest": False, "reason": reason})
            self._over.set()

    async def wait(self) -> Outcome:
        """Wait until the guest has ended, or until `quit`. A guest that has moved away has not ended here.

        Raises what an incoming migration failed with, unless that was to be survived.
        """
        await self._over.wait()
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def _fail(self, error: KvmmigError) -> None:
        self._failure = error
        self._here.set()
        self._over.set()

    def _adopt(self, machine: Machine) -> None:
        self._life.machine = machine
        self._here.set()
        machine.on_state(lambda _: self._events.note_running())
        self._events.note_running()
        self._nursery.start_soon(self._watch, machine)

    async def _watch(self, machine: Machine) -> None:
        while (ending := await machine.wait()).kind == "moved":
            await self._taken_back.wait()
        if ending.kind == "crash":
            self._events.emit("GUEST_PANICKED", {"action": "poweroff", "x-kvmmig-report": ending.report})
        if ending.kind != "ended":
            reason = {"crash": "guest-panic", "reset": "guest-reset"}.get(ending.kind, "guest-shutdown")
            self._events.emit("SHUTDOWN", {"guest": True, "reason": reason})
        self._outcome = Outcome(ending)
        self._over.set()
