"""Migration under QEMU's names: away from here, to here, its parameters and capabilities."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec
import trio
from msgspec import UNSET, UnsetType

from kvmmig.migration.policy import Stopped
from kvmmig.migration.welcome import Welcome
from kvmmig.monitor import targets
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.parameters import ParameterChanges
from kvmmig.monitor.replies import migration_info
from kvmmig.monitor.targets import Channels, Target
from kvmmig.qmp import Arguments, CommandTable, NoArguments, QMPError, Session
from kvmmig.units import CPUS, MEMORY


class MigrateArguments(Arguments, frozen=True):
    uri: str | UnsetType = UNSET
    channels: Channels | UnsetType = UNSET
    detach: bool = True  # all it ever was is a wish of QEMU's human monitor
    resume: bool = False
    x_kvmmig_live: bool = True
    #: Only save the guest, which goes on here. QEMU has no such argument.
    keep_running: bool = msgspec.field(name="x-kvmmig-keep-running", default=False)


class IncomingArguments(Arguments, frozen=True):
    ranges: ClassVar = {"x_kvmmig_max_memory": MEMORY, "x_kvmmig_max_cpus": CPUS}
    uri: str | UnsetType = UNSET
    channels: Channels | UnsetType = UNSET
    exit_on_error: bool | None = None
    x_kvmmig_max_memory: int | None = None
    x_kvmmig_max_cpus: int | None = None
    x_kvmmig_accept_from: list[str] = msgspec.field(default_factory=list)

    def welcome(self) -> Welcome:
        """Raises `QMPError`."""
        try:
            return Welcome.of(
                max_memory=self.x_kvmmig_max_memory,
                max_cpus=self.x_kvmmig_max_cpus,
                accept_from=self.x_kvmmig_accept_from,
            )
        except ValueError as error:
            raise QMPError(str(error)) from error


class ContinueArguments(Arguments, frozen=True):
    state: Literal["pre-switchover", "device", "active", "setup", "completed", "failed", "cancelled"]


class CapabilityState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    capability: str
    state: bool


class CapabilitiesArguments(Arguments, frozen=True):
    capabilities: list[CapabilityState]


def add_migration_commands(table: CommandTable, control: MachineControl) -> None:
    """Add them to the table."""

    async def find_target(session: Session, arguments: MigrateArguments | IncomingArguments) -> Target:
        return await targets.find_target(
            session,
            arguments.uri,
            arguments.channels,
            may_exec=control.settings.may_exec,
            writing=isinstance(arguments, MigrateArguments),
        )

    @table.command("migrate", MigrateArguments)
    async def migrate(session: Session, arguments: MigrateArguments) -> None:
        if arguments.resume:
            raise QMPError(
                "Cannot resume if there is no paused migration: only post-copy pauses, and there is none here"
            )
        await control.settled()
        control.outgoing.check()
        target = await find_target(session, arguments)
        try:
            policy = None if arguments.x_kvmmig_live else Stopped()
            control.outgoing.begin(
                target.transport, policy=policy, keep_running=arguments.keep_running, on_end=target.done
            )
        except BaseException:
            target.leave(session)
            raise
        target.take(session)

    @table.command("migrate_cancel")
    async def migrate_cancel(session: Session, arguments: NoArguments) -> None:
        control.outgoing.cancel()

    @table.command("migrate-continue", ContinueArguments)
    async def migrate_continue(session: Session, arguments: ContinueArguments) -> None:
        status, migration = control.outgoing.status, control.outgoing.migration
        if arguments.state != status:
            raise QMPError(f"Migration not in expected state: {status or 'none'}")
        if status != "pre-switchover" or migration is None:
            raise QMPError(f"a migration does not wait in the state '{status}'; only in 'pre-switchover'")
        migration.proceed()

    @table.command("migrate-incoming", IncomingArguments)
    async def migrate_incoming(session: Session, arguments: IncomingArguments) -> None:
        await control.settled()
        if control.run_state() != "inmigrate":
            raise QMPError("'--incoming' was not specified on the command line, so no guest can arrive here")
        control.incoming.check()
        welcome = await trio.to_thread.run_sync(arguments.welcome)  # it may look users up
        target = await find_target(session, arguments)
        try:
            await control.incoming.listen(
                target.transport, exit_on_error=arguments.exit_on_error, welcome=welcome
            )
        except ValueError as error:
            target.leave(session)
            raise QMPError(str(error)) from error
        except BaseException:
            target.leave(session)
            raise
        target.take(session)

    @table.command("query-migrate")
    async def query_migrate(session: Session, arguments: NoArguments) -> object:
        return migration_info(control)

    @table.command("migrate-set-parameters", ParameterChanges)
    async def migrate_set_parameters(session: Session, arguments: ParameterChanges) -> None:
        control.settings.change_parameters(arguments)

    @table.command("query-migrate-parameters")
    async def query_migrate_parameters(session: Session, arguments: NoArguments) -> object:
        return control.settings.parameters

    @table.command("migrate-set-capabilities", CapabilitiesArguments)
    async def migrate_set_capabilities(session: Session, arguments: CapabilitiesArguments) -> None:
        if control.outgoing.active:
            raise QMPError("There's a migration process in progress")
        control.settings.set_capabilities([(one.capability, one.state) for one in arguments.capabilities])

    @table.command("query-migrate-capabilities")
    async def query_migrate_capabilities(session: Session, arguments: NoArguments) -> object:
        return [{"capability": name, "state": state} for name, state in control.settings.capabilities.items()]
