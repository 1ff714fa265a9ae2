"""A machine's migrations away from here, one at a time: begun, cancelled, waited for, told of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from kvmmig.errors import KvmmigError, MigrationCancelled, MigrationError, OutcomeUnknown, WrongState
from kvmmig.machine import Machine, State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.phases import PHASES, Phase
from kvmmig.migration.policy import Limits, Policy, RoundFigures
from kvmmig.migration.report import MigrationStatistics
from kvmmig.monitor.dirty_rate import DirtyRate
from kvmmig.monitor.events import Events
from kvmmig.monitor.figures import figures_reply
from kvmmig.monitor.life import Life
from kvmmig.monitor.parameters import MigrationSettings
from kvmmig.monitor.states import SWITCHING_OVER, MigrationStatus, status_of
from kvmmig.transport import Transport, TransportURI, transport_for

_log = logging.getLogger(__name__)


@dataclass
class _Attempt:
    migration: OutgoingMigration
    ended: trio.Event = field(default_factory=trio.Event)
    error: KvmmigError | None = None


class Outgoing:
    """The present migration, or the last one, and what can be done about it: `MachineControl.outgoing`."""

    def __init__(
        self,
        life: Life,
        settings: MigrationSettings,
        events: Events,
        dirty_rate: DirtyRate,
        *,
        nursery: trio.Nursery,
        strays: trio.Nursery,
    ) -> None:
        """Use `MachineControl.outgoing`.

        A migration runs in ``nursery``. What its channel does that can't be ended stays in ``strays``."""
        #: By QEMU's name, as it was last told; None before the first one.
        self.status: MigrationStatus | None = None
        self._life = life
        self._settings = settings
        self._events = events
        self._dirty_rate = dirty_rate
        self._nursery = nursery
        self._strays = strays
        self._attempt: _Attempt | None = None
        self._passes = 0

    @property
    def migration(self) -> OutgoingMigration | None:
        """Its figures, page map and knobs; None before the first one."""
        return self._attempt.migration if self._attempt is not None else None

    @property
    def active(self) -> bool:
        """Whether one is running."""
        return self._life.migrates

    @property
    def phase(self) -> Phase | None:
        """Where it is; None before the first one."""
        if self.migration is None:
            return None
        phase = self.migration.phase
        return phase if self.active or PHASES[phase].is_end else Phase.FAILED  # it has not even begun

    @property
    def error(self) -> str:
        """Why the last one failed, one sentence; empty where it has not."""
        error = self._attempt.error if self._attempt is not None else None
        return "" if error is None else str(error)

    def check(self) -> Machine:
        """The machine to be migrated. Raises `WrongState` where `begin` could not begin now."""
        machine = self._life.guest("migrate")
        if machine.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"the guest {machine.state}, so it can't be migrated; only a running or paused one can"
            )
        return machine

    def begin(
        self,
        to: str | TransportURI | Transport,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        keep_running: bool = False,
        on_end: Callable[[], None] = lambda: None,
    ) -> OutgoingMigration:
        """Begin to move the guest, in the background; returns at once. ``on_end`` is called at its end.

        ``policy`` and ``limits`` are for this migration alone, in the place of what the settings say. With
        ``keep_running`` the guest is only saved, and goes on here.

        Finding a transport by its URI imports modules; to keep the loop free, do that in a thread and give
        the `Transport`. Raises `BadURI`; `MigrationError` where a guest that is to go on here would not be
        stored; `WrongState` where another migration runs or there is no guest.
        """
        machine = self.check()
        transport = to if isinstance(to, Transport) else transport_for(to)

        def make(policy: Policy, limits: Limits) -> OutgoingMigration:
            return OutgoingMigration(
                machine,
                transport,
                policy=policy,
                limits=limits,
                pause_before_switchover=self._settings.capabilities["pause-before-switchover"],
                keep_running=keep_running,
                on_phase=self._note_phase,
                on_round=self._note_round,
                record=self._settings.parameters.x_kvmmig_record or None,
            )

        migration = self._settings.begin(make, policy, limits, stores=transport.stores)
        self._life.enter("migrate")
        self._attempt = _Attempt(migration)
        self._passes = 0
        self.status = None
        self._tell(status_of(Phase.SETUP))
        self._nursery.start_soon(self._run, self._attempt, on_end)
        return migration

    def cancel(self, why: str = "it was cancelled") -> None:
        """Cancel the migration that runs; no effect where none does.

        Raises `MigrationError` when the guest has been handed over already.
        """
        if self.migration is not None and self.active:
            self.migration.cancel(why)
            self._tell("cancelling")

    async def wait(self) -> MigrationStatistics:
        """Wait for the migration's end; returns its last figures, or raises what it failed with.

        A cancel leaves it running. Raises `WrongState` where there has been none.
        """
        attempt = self._attempt
        if attempt is None:
            raise WrongState("there has been no migration from here")
        await attempt.ended.wait()
        if attempt.error is not None:
            raise attempt.error
        return attempt.migration.statistics()

    async def _run(self, attempt: _Attempt, on_end: Callable[[], None]) -> None:
        try:
            await self._dirty_rate.end()  # the dirty log belongs to one at a time
            await attempt.migration.run(self._strays)
        except KvmmigError as error:
            attempt.error = error
        except Exception as error:  # a bug here must not cost anybody their guest
            _log.exception("the migration failed by a bug of kvmmig; the guest is kept")
            attempt.error = MigrationError(f"the migration failed by a bug of kvmmig: {error!r}")
        except BaseException:  # a cancel, bare or in a nursery's group
            attempt.error = _abandoned(attempt.migration.phase)
            raise
        finally:
            self._settings.end()
            self._life.happened("migration is over")
            attempt.ended.set()
            on_end()
            assert self.phase is not None
            self._events.note_running()
            self._tell(status_of(self.phase))
            # Its machine may be gone before anybody can ask how it ended.
            figures = figures_reply(attempt.migration.statistics(), self.status)
            self._events.emit("X_KVMMIG_MIGRATION_ENDED", {"figures": figures})

    def _note_phase(self, phase: Phase) -> None:
        """From the migration. Its end is told when all of it has come to an end, by `_run`."""
        if PHASES[phase].is_end:
            return
        if phase in SWITCHING_OVER:
            self._life.happened("switchover")
            # To pause it is the next thing that the migration does.
            self._events.note_running(stopping=True)
        # As in QEMU, the first reading of the dirty log is told before "active", the last one after "device".
        if phase is Phase.ROUNDS:
            self._tell_pass()
        if self.status != "cancelling":
            self._tell(status_of(phase))
        if phase is Phase.FINAL:
            self._tell_pass()

    def _note_round(self, figures: RoundFigures) -> None:
        self._tell_pass()

    def _tell_pass(self) -> None:
        """The dirty log has been read, or is about to be for the first time."""
        self._passes += 1
        self._events.emit_of_migration("MIGRATION_PASS", {"pass": self._passes})

    def _tell(self, status: MigrationStatus) -> None:
        if status != self.status:
            self.status = status
            self._events.emit_of_migration("MIGRATION", {"status": status})


def _abandoned(phase: Phase) -> MigrationError:
    """What to say of a migration whose machine is controlled no more."""
    if phase is Phase.UNKNOWN:
        return OutcomeUnknown(
            "the guest was handed over, and this side was told to end before the other one had said that it "
            "runs; look there first"
        )
    return MigrationCancelled("the migration was cancelled: nobody controls its machine any more")
