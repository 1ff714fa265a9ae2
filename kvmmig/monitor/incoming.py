"""A guest that comes to a machine by migration: from "listen there" to "it is here"."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias

import trio

from kvmmig.errors import KvmmigError, MigrationError, WrongState
from kvmmig.machine import Machine
from kvmmig.machine.populating import Reserve
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.policy import Limits
from kvmmig.migration.welcome import Welcome
from kvmmig.monitor.events import Events
from kvmmig.monitor.life import Life
from kvmmig.monitor.parameters import MigrationSettings
from kvmmig.transport import Transport, TransportURI, transport_for

IncomingStatus: TypeAlias = Literal["setup", "active", "completed", "failed"]
_log = logging.getLogger(__name__)


class Incoming:
    """The guest that is to come, or has come, by migration. See `MachineControl.incoming`."""

    def __init__(
        self,
        life: Life,
        settings: MigrationSettings,
        events: Events,
        *,
        output: Callable[[bytes], None] | None,
        reserve: Reserve | None,
        limits: Callable[[], Limits],
        on_here: Callable[[Machine], None],
        on_failure: Callable[[KvmmigError], None],
        machines: trio.Nursery,
        strays: trio.Nursery,
    ) -> None:
        """Use `MachineControl.incoming`.

        ``on_here`` gets the guest before its source is told so: who hears it from there finds it here.

        ``limits`` says what bounds a source. ``on_failure`` gets what ends the machine's life. The guest
        lives in ``machines``, what a channel does that can't be ended in ``strays``.
        """
        #: The receiving side's figures, and what the user should know; None before it listens.
        self.migration: IncomingMigration | None = None
        #: Where it listens in fact: with the port that the kernel chose. None before it listens.
        self.uri: TransportURI | None = None
        #: Whether the guest runs when it is here, if it ran at its source; else it is yet to be started.
        self.start = True
        #: None before it listens.
        self.status: IncomingStatus | None = None
        #: Which guests may come, and from whom: the operator's word, that a client can only narrow.
        self.welcome = Welcome()
        #: Told why a guest that had begun to come did not, where others may still come.
        self.on_setback: Callable[[KvmmigError], None] = lambda error: None
        self._life = life
        self._settings = settings
        self._events = events
        self._output = output
        self._reserve = reserve
        self._limits = limits
        self._on_here = on_here
        self._on_failure = on_failure
        self._machines = machines
        self._strays = strays
        self._error: KvmmigError | None = None
        self._setback: KvmmigError | None = None
        self._ended = trio.Event()

    @property
    def error(self) -> str:
        """Why it failed, or why the last guest that had begun to come did not; empty where none has."""
        error = self._error or self._setback
        return "" if error is None else str(error)

    @property
    def peer(self) -> str:
        """Who sends the guest, and whose process that is; empty before anybody does."""
        return self.migration.peer if self.migration is not None else ""

    def check(self) -> None:
        """Raise `WrongState` where `listen` could not begin now."""
        self._life.check("listen")

    def defer(self) -> None:
        """The guest comes by migration, from where `listen` will say later."""
        self._life.enter("defer")

    async def listen(
        self,
        at: str | TransportURI | Transport,
        *,
        exit_on_error: bool | None = None,
        welcome: Welcome | None = None,
        prefault: bool = False,
    ) -> None:
        """Listen for a guest; it arrives in the background, and runs if it ran. Returns when it listens.

        Where sources connect it goes on listening until a guest is here, whatever one of them fails with.
        With ``exit_on_error`` given the first source that says a whole hello decides. When it fails,
        `MachineControl.wait` raises why; with False this can be called again instead. The same holds, with
        True as the default, for a guest that is there at once, as in a file.

        ``welcome`` narrows what `welcome <Incoming.welcome>` says. ``prefault`` is as for
        `IncomingMigration`.

        Raises `BadURI`, `ConnectFailed`, `ValueError` for what can't be narrowed so, and `WrongState` where
        there is a guest, or one on its way. After a cancel, and after these, nobody listens, and this can be
        called again.
        """
        self.check()
        bounds = self.welcome.narrowed(welcome) if welcome is not None else self.welcome
        transport = at if isinstance(at, Transport) else await trio.to_thread.run_sync(transport_for, at)
        self._life.enter("listen")  # somebody else may have been faster
        self._life.source = str(transport.uri)
        listens = await self._machines.start(self._receive, transport, bounds, exit_on_error, prefault)
        if not listens:
            assert self._error is not None
            error, self._error = self._error, None
            raise error

    async def wait(self) -> None:
        """Wait until the guest is here. Raises what it failed with; `WrongState` where none is on its way."""
        if self.status is None:
            raise WrongState("no guest is on its way here")
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def _receive(
        self,
        transport: Transport,
        welcome: Welcome,
        exit_on_error: bool | None,
        prefault: bool,
        *,
        task_status: trio.TaskStatus[bool],
    ) -> None:
        """The guest's life here, until this is cancelled."""
        listens = False

        def note_listening(uri: TransportURI) -> None:
            nonlocal listens
            listens = True
            self.uri, self._life.source = uri, str(uri)
            self.migration, self._error, self._ended = migration, None, trio.Event()
            self._setback = None
            self._life.happened("listens")
            self._enter("setup")
            task_status.started(True)

        migration = IncomingMigration(
            transport,
            output=self._output,
            limits=self._limits,
            welcome=welcome,
            keep_listening=exit_on_error is None,
            on_listening=note_listening,
            on_connected=lambda: self._enter("active"),
            reserve=self._reserve,
            on_setback=self._note_setback,
            on_here=self._note_here,
            start=self.start,
            record=self._settings.parameters.x_kvmmig_record or None,
            strays=self._strays,
            prefault=prefault,
        )
        try:
            async with migration.machine():
                await trio.sleep_forever()
        except BaseException as error:
            if self._life.machine is not None:
                raise
            self._life.happened("not arrived")
            if not isinstance(error, Exception):
                raise
            self._error = _as_kvmmig_error(error)
            if not listens:
                task_status.started(False)
                return
            self._ended.set()
            self._enter("failed")
            if exit_on_error is not False:
                self._on_failure(self._error)

    def _note_here(self, machine: Machine) -> None:
        self._life.happened("arrived")
        self._on_here(machine)  # clients hear that it runs before they hear that the migration is over
        self._ended.set()
        self._enter("completed")

    def _note_setback(self, error: KvmmigError) -> None:
        self._setback = error
        _log.info("a guest that had begun to come did not: %s", error)
        self._enter("failed")
        self._enter("setup")
        self.on_setback(error)

    def _enter(self, status: IncomingStatus) -> None:
        self.status = status
        data: dict[str, object] = {"status": status}
        if status == "active":
            _log.info("a guest comes from %s", self.peer)
            data["x-kvmmig-peer"] = self.peer
        self._events.emit_of_migration("MIGRATION", data)


def _as_kvmmig_error(error: Exception) -> KvmmigError:
    if isinstance(error, KvmmigError):
        return error
    _log.error("the incoming migration failed by a bug of kvmmig", exc_info=error)
    return MigrationError(f"the incoming migration failed by a bug of kvmmig: {error!r}")
