"""A machine's migrations away from here, one at a time: begun, cancelled, waited for, told of."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from kvmmig.errors import KvmmigError, MigrationCancelled, MigrationError, OutcomeUnknown, WrongState
from kvmmig.machine import Machine, State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, Policy, RoundFigures
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.transport import Transport
from kvmmig.monitor.parameters import MigrationSettings
from kvmmig.monitor.states import ENDS, SWITCHING_OVER, MigrationStatus, status_of

Emit = Callable[[str, Mapping[str, object]], None]
_log = logging.getLogger(__name__)


class Departures:
    """``emit`` gets MIGRATION and MIGRATION_PASS; ``on_phase`` each phase, before that is told."""

    def __init__(self, settings: MigrationSettings, emit: Emit, on_phase: Callable[[Phase], None]) -> None:
        #: The present one, or the last one.
        self.migration: OutgoingMigration | None = None
        #: Its phase.
        self.phase: Phase | None = None
        self._settings = settings
        self._emit = emit
        self._on_phase = on_phase
        self._told: MigrationStatus | None = None
        self._passes = 0
        self._cancelling = False
        self._error: Exception | None = None
        self._ended = trio.Event()
        self._ended.set()

    @property
    def active(self) -> bool:
        """Whether one is running."""
        return not self._ended.is_set()

    @property
    def switching_over(self) -> bool:
        """Whether one holds the guest stopped: nobody else may start or stop it then."""
        return self.active and self.phase in SWITCHING_OVER

    @property
    def status(self) -> MigrationStatus | None:
        """The present or last one's, by QEMU's name; None before the first one."""
        if self.phase is None:
            return None
        return "cancelling" if self._cancelling and self.active else status_of(self.phase)

    def check(self, machine: Machine) -> None:
        """Raise `WrongState` where `begin` could not begin now."""
        if self.active:
            raise WrongState("There's a migration process in progress")  # QEMU's sentence: tools look for it
        if machine.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"the guest {machine.state}, so it can't be migrated; only a running or paused one can"
            )

    def begin(
        self,
        machine: Machine,
        transport: str | Transport,
        policy: Policy | None = None,
        limits: Limits | None = None,
    ) -> OutgoingMigration:
        """A new one, which is to be `run` next. Raises `WrongState` and `BadURI`."""
        self.check(machine)

        def make(policy: Policy, limits: Limits) -> OutgoingMigration:
            return OutgoingMigration(
                machine,
                transport,
                policy=policy,
                limits=limits,
                pause_before_switchover=self._settings.capabilities["pause-before-switchover"],
                on_phase=self._note_phase,
                on_round=self._note_round,
            )

        self.migration = self._settings.begin(make, policy, limits)
        self.phase = Phase.SETUP
        self._told = None
        self._passes = 0
        self._cancelling = False
        self._error = None
        self._ended = trio.Event()
        return self.migration

    async def run(self, before: Callable[[], Awaitable[None]]) -> None:
        """Carry out what `begin` has made, after ``await before()``. Raises nothing: see `ended`."""
        assert self.migration is not None
        try:
            await before()
            await self.migration.run()
        except KvmmigError as error:
            self._error = error
        except Exception as error:  # a bug here must not cost anybody their guest
            _log.exception("the migration failed by a bug of kvmmig; the guest is kept")
            self._error = MigrationError(f"the migration failed by a bug of kvmmig: {error!r}")
        except BaseException:  # a cancel, bare or in a nursery's group
            self._error = _abandoned(self.migration.statistics().phase)
            raise
        finally:
            phase = self.migration.statistics().phase
            self._settings.end()
            self._ended.set()
            self._note_phase(phase if phase in ENDS else Phase.FAILED)

    def cancel(self, why: str) -> None:
        """Cancel the one that runs, if any. Raises `MigrationError` when the guest has been handed over."""
        if self.migration is not None and self.active:
            self.migration.cancel(why)
            self._cancelling = True
            self._tell()

    async def ended(self) -> MigrationStatistics:
        """Wait for the end of the one that runs; returns the last figures, or raises what it failed with."""
        if self.migration is None:
            raise WrongState("there has been no migration from here")
        migration, ended = self.migration, self._ended
        await ended.wait()
        if self._error is not None:
            raise self._error
        return migration.statistics()

    @property
    def error(self) -> str:
        """Why the last one failed, one sentence; empty where it has not."""
        return "" if self._error is None else str(self._error)

    def _note_phase(self, phase: Phase) -> None:
        self.phase = phase
        self._on_phase(phase)
        self._tell()
        if phase in (Phase.ROUNDS, Phase.FINAL):
            self._tell_pass()

    def _note_round(self, figures: RoundFigures) -> None:
        self._tell_pass()

    def _tell_pass(self) -> None:
        """The dirty log has been read, or is about to be for the first time."""
        self._passes += 1
        self._emit("MIGRATION_PASS", {"pass": self._passes})

    def _tell(self) -> None:
        status = self.status
        if status is not None and status != self._told:
            self._told = status
            self._emit("MIGRATION", {"status": status})


def _abandoned(phase: Phase) -> MigrationError:
    """What to say of a migration whose machine is controlled no more."""
    if phase is Phase.UNKNOWN:
        return OutcomeUnknown(
            "the guest was handed over, and this side was told to end before the other one had said that it "
            "runs; look there first"
        )
    return MigrationCancelled("the migration was cancelled: nobody controls its machine any more")
