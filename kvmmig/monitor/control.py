"""One machine under control: all that a monitor, or a command, can do to it goes through here.

A `MachineControl` owns the machine and the tasks around it: the guest that arrives, the migration that takes
it away, a measurement. It keeps the rules between them (one migration at a time, no `cont` while one hands
the guest over) and tells what happens as QEMU's events.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Self

import trio

from kvmmig.errors import KvmmigError, WrongState
from kvmmig.machine import Ending, Machine, MachineConfig, Program, State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, Policy
from kvmmig.transport.registry import transport_for
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.transport import Transport
from kvmmig.monitor.arrival import Arrival, ArrivalStatus
from kvmmig.monitor.departure import Departures
from kvmmig.monitor.dirty_rate import DirtyRate
from kvmmig.monitor.nursery import background
from kvmmig.monitor.parameters import MigrationSettings
from kvmmig.monitor.states import MigrationStatus, run_state, run_state_at_end

Listener = Callable[[str, Mapping[str, object]], None]
_log = logging.getLogger(__name__)


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
        *,
        name: str,
        output: Callable[[bytes], None] | None = None,
        on_populate: Callable[[int, int], None] | None = None,
        guest_follows: bool = False,
    ) -> None:
        """Use `open`."""
        #: What its clients are told that it is called.
        self.name = name
        #: None until a guest has been loaded, or has arrived.
        self.machine: Machine | None = None
        #: The present arrival, or the last one.
        self.arrival: Arrival | None = None
        #: Parameters, capabilities and policy of its migrations.
        self.settings = MigrationSettings()
        #: The last measurement of `measure_dirty_rate`.
        self.dirty_rate = DirtyRate()
        self._departures = Departures(self.settings, self._emit_migration, self._note_phase)
        self._output = output
        self._on_populate = on_populate
        self._listeners: list[Listener] = []
        self._machines: AsyncExitStack
        self._nursery: trio.Nursery
        self._by_migration = False  # where its guest comes from
        self._ran = False  # as the last STOP or RESUME said
        self._resetting = False
        self._loading = trio.Event()  # not set while it is under way, or is to come
        if not guest_follows:
            self._loading.set()
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
        on_populate: Callable[[int, int], None] | None = None,
        guest_follows: bool = False,
    ) -> AsyncIterator[Self]:
        """Control a machine called ``name``; at the end of the block all of it is taken down.

        ``output`` gets what the guest sends to its serial port, in vCPU threads, and must not block;
        ``on_populate`` bytes done and in all while the guest's memory is being populated. With
        ``guest_follows`` what is asked of the guest waits for `load`, `incoming` or `defer`: a client may be
        there before them. A migration that runs when the block is left is cancelled first, so its other side
        gets no guest.
        """
        control = cls(name=name, output=output, on_populate=on_populate, guest_follows=guest_follows)
        # A migration ends before its machine goes.
        async with AsyncExitStack() as control._machines, background() as control._nursery:
            yield control

    def subscribe(self, listener: Listener) -> None:
        """Tell ``listener`` of every event, on the event loop: its QMP name and its data.

        STOP, RESUME, RESET, SHUTDOWN, GUEST_PANICKED; MIGRATION and MIGRATION_PASS while the capability
        ``events`` is on.
        """
        self._listeners.append(listener)

    # -- the machine's life -------------------------------------------------------------------------

    def run_state(self) -> str:
        """What the machine does, by QEMU's names of run states."""
        if self._outcome.ending is not None:
            return run_state_at_end(self._outcome.ending)
        return run_state(self.machine, incoming=self._by_migration, phase=self._departures.phase)

    async def load(self, config: MachineConfig, program: Program, *, start: bool = False) -> None:
        """Build a machine with a program in it, ready to be started, or started at once.

        What is asked of the guest meanwhile waits: a client may be there before it. Raises `BadConfig`,
        `BadImage`, `KvmError`; `WrongState` where there is a machine already.
        """
        if self.machine is not None or self._by_migration:
            raise WrongState(f"{self.name!r} has its guest already; start another machine for another one")
        if self._loading.is_set():
            self._loading = trio.Event()
        try:
            machine = await self._machines.enter_async_context(
                Machine.open(config, output=self._output, on_populate=self._on_populate)
            )
            await machine.load(program)
            if start:
                await machine.start()
            self._adopt(machine)
        finally:
            self._loading.set()

    def adopt(self, machine: Machine) -> None:
        """Control a machine that somebody else has opened, and will close after this control.

        Raises `WrongState` where there is a machine already.
        """
        if self.machine is not None or self._by_migration:
            raise WrongState(f"{self.name!r} has its guest already; start another machine for another one")
        self._adopt(machine)

    async def loaded(self) -> None:
        """Wait while `load` is under way, or is to come."""
        await self._loading.wait()

    async def start(self) -> None:
        """Let the guest run for the first time; the same as `cont`."""
        await self.cont()

    async def stop(self) -> None:
        """Pause the guest; all its vCPUs stand still when this returns. No effect on one that is paused.

        Raises `WrongState` while a migration hands it over.
        """
        await self.loaded()
        self._refuse_switchover()
        await self._guest().pause()

    async def cont(self) -> None:
        """Let the guest run. No effect on one that runs.

        Raises `WrongState` while a migration hands it over, and for one that has moved away: see `take_back`.
        """
        await self.loaded()
        self._refuse_switchover()
        await self._guest().start()

    async def take_back(self) -> None:
        """Let a guest that has moved away run here again: the word of an operator who has looked there.

        Two that run at once would both write to the world. Raises `WrongState` unless it has moved.
        """
        machine = self._guest()
        if self.migrating or machine.state is not State.MOVED:
            raise WrongState(
                f"there is nothing to take back: the guest {machine.state}; this is for one that was handed "
                "over and does not run on the other side"
            )
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
        await self.loaded()
        machine = self._guest()
        if self.migrating:
            raise WrongState("a guest can't be reset while it migrates; cancel the migration first")
        self._resetting = True
        try:
            await self.dirty_rate.end()
            await machine.reset()
        finally:
            self._resetting = False
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def quit(
        self, *, reason: Literal["host-qmp-quit", "host-signal", "host-error"] = "host-qmp-quit"
    ) -> None:
        """End the machine's life: `wait` returns. Whoever waits leaves the block of `open`."""
        if not self._over.is_set():
            self._emit("SHUTDOWN", {"guest": False, "reason": reason})
            self._over.set()

    async def wait(self) -> Outcome:
        """Wait until the guest has ended, or until `quit`. A guest that has moved away has not ended here.

        Raises what an arrival failed with, unless that was to be survived.
        """
        await self._over.wait()
        if self._failure is not None:
            raise self._failure
        return self._outcome

    def measure_dirty_rate(self, seconds: float) -> None:
        """Begin to measure how fast the guest writes, in the background; see `dirty_rate` for the result.

        A migration that begins meanwhile ends it. Raises `WrongState` while another measurement, or a
        migration, is running.
        """
        machine = self._guest()
        if self.migrating:
            raise WrongState("a migration is running and needs the dirty log for itself; see query-migrate")
        if self.dirty_rate.status == "measuring":
            raise WrongState("the dirty rate is being measured already; wait until query-dirty-rate has it")
        self.dirty_rate.begin(seconds)
        self._nursery.start_soon(self._measure, machine)

    # -- arriving -----------------------------------------------------------------------------------

    def defer(self) -> None:
        """The guest comes by migration, from where `incoming` will say later."""
        self._by_migration = True
        self._loading.set()

    async def incoming(self, uri: str | Transport, *, exit_on_error: bool = True) -> None:
        """Listen for a guest; it arrives in the background, and runs if it ran. Returns when it listens.

        Raises `BadURI`, `ConnectFailed`, and `WrongState` where there is a guest, or one on its way. When it
        fails later, `wait` raises why; without ``exit_on_error`` this can be called again instead.
        """
        self.check_can_arrive()
        if isinstance(uri, str):
            uri = await trio.to_thread.run_sync(transport_for, uri)
        listener = await uri.listen()
        try:
            self.check_can_arrive()  # somebody else may have been faster
        except WrongState:
            await listener.aclose()
            raise
        self._by_migration = True
        self._loading.set()
        self.arrival = Arrival(
            listener,
            output=self._output,
            on_populate=self._on_populate,
            on_status=self._note_arrival,
            on_here=self._adopt,
        )
        self._note_arrival("setup")
        self._nursery.start_soon(self._arrive, self.arrival, exit_on_error)

    def check_can_arrive(self) -> None:
        """Raise `WrongState` where `incoming` could not begin now."""
        if self.machine is not None:
            raise WrongState(f"{self.name!r} has its guest already; start another machine for another one")
        if self.arrival is not None and self.arrival.active:
            raise WrongState(f"{self.name!r} waits for its guest at {self.arrival.uri} already")

    async def wait_arrived(self) -> Arrival:
        """Wait until the guest is here. Raises what its arrival failed with."""
        if self.arrival is None:
            raise WrongState("no guest is on its way here")
        arrival = self.arrival
        await arrival.wait()
        return arrival

    async def wait_guest(self) -> Machine:
        """Wait until there is a machine: loaded, or arrived. Raises as `wait` does."""
        await self._here.wait()
        if self.machine is None:
            assert self._failure is not None
            raise self._failure
        return self.machine

    # -- leaving ------------------------------------------------------------------------------------

    @property
    def migration(self) -> OutgoingMigration | None:
        """The present migration away from here, or the last one."""
        return self._departures.migration

    @property
    def migrating(self) -> bool:
        """Whether a migration away from here is running."""
        return self._departures.active

    @property
    def migration_status(self) -> MigrationStatus | None:
        """The present or last migration's, by QEMU's name; None before the first one."""
        return self._departures.status

    @property
    def migration_error(self) -> str:
        """Why the last migration failed, one sentence; empty where it has not."""
        return self._departures.error

    def migrate(
        self,
        uri: str | Transport,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> OutgoingMigration:
        """Begin to move the guest, in the background; returns at once. ``on_end`` is called at its end.

        ``policy`` and ``limits`` are for this migration alone, in the place of what `settings` says.

        Finding a transport by its URI imports modules; to keep the loop free, do that in a thread and give
        the `Transport`. Raises `BadURI`; `WrongState` where another migration runs or there is no guest.
        """
        self.check_can_migrate()
        migration = self._departures.begin(self._guest(), uri, policy, limits)

        async def leave() -> None:
            try:
                # The dirty log belongs to one at a time.
                await self._departures.run(before=self.dirty_rate.end)
            finally:
                on_end()

        self._nursery.start_soon(leave)
        return migration

    def check_can_migrate(self) -> None:
        """Raise `WrongState` where `migrate` could not begin now."""
        machine = self._guest()
        if self._resetting:
            raise WrongState("the guest is being reset; migrate it when that is done")
        self._departures.check(machine)

    def cancel(self, why: str = "it was cancelled") -> None:
        """Cancel the migration that runs; no effect where none does.

        Raises `MigrationError` when the guest has been handed over already.
        """
        self._departures.cancel(why)

    async def migration_ended(self) -> MigrationStatistics:
        """Wait for the migration's end; returns its last figures, or raises what it failed with.

        A cancel leaves it running. Raises `WrongState` where there has been none.
        """
        return await self._departures.ended()

    # -- inside -------------------------------------------------------------------------------------

    def _guest(self) -> Machine:
        if self.machine is None:
            raise WrongState(
                "the guest has not arrived yet" if self._by_migration else f"{self.name!r} has no guest yet"
            )
        return self.machine

    def _refuse_switchover(self) -> None:
        # The migration reads the stopped guest's memory and state: nobody else may start or stop it now.
        if self._departures.switching_over:
            raise WrongState("Migration is not finalized yet; wait for its end, or cancel it")

    def _adopt(self, machine: Machine) -> None:
        self.machine = machine
        self._here.set()
        machine.on_state(lambda _: self._note_running())
        self._note_running()
        self._nursery.start_soon(self._watch, machine)

    async def _watch(self, machine: Machine) -> None:
        while (ending := await machine.wait()).kind == "moved":
            await self._taken_back.wait()
        if ending.kind == "crash":
            self._emit("GUEST_PANICKED", {"action": "poweroff", "x-kvmmig-report": ending.report})
        if ending.kind != "stopped":
            reason = {"crash": "guest-panic", "reset": "guest-reset"}.get(ending.kind, "guest-shutdown")
            self._emit("SHUTDOWN", {"guest": True, "reason": reason})
        self._outcome = Outcome(ending)
        self._over.set()

    async def _arrive(self, arrival: Arrival, exit_on_error: bool) -> None:
        try:
            await self._machines.enter_async_context(arrival.machine())
        except KvmmigError as error:
            if exit_on_error:
                self._failure = error
                self._here.set()
                self._over.set()

    async def _measure(self, machine: Machine) -> None:
        try:
            await self.dirty_rate.run(machine)
        except KvmmigError as error:
            _log.warning("the dirty rate can't be measured: %s", error)

    # -- telling ------------------------------------------------------------------------------------

    def _emit(self, event: str, data: Mapping[str, object]) -> None:
        for listener in self._listeners:
            listener(event, data)

    def _emit_migration(self, event: str, data: Mapping[str, object]) -> None:
        if self.settings.capabilities["events"]:
            self._emit(event, data)

    def _note_arrival(self, status: ArrivalStatus) -> None:
        self._emit_migration("MIGRATION", {"status": status})

    def _note_phase(self, phase: Phase) -> None:
        stops = phase in (Phase.PRE_SWITCHOVER, Phase.STOP)  # the next thing that the migration does
        self._note_running(stopping=stops)

    def _note_running(self, *, stopping: bool = False) -> None:
        if self.machine is None or self.machine.state in (State.ENDED, State.CLOSED):
            return  # that is told by another event
        runs = self.machine.state is State.RUNNING and not stopping
        if runs != self._ran:
            self._ran = runs
            self._emit("RESUME" if runs else "STOP", {})
