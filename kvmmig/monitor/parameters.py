"""What a monitor may set for migrations: parameters, capabilities and the policy, under QEMU's names.

A `MigrationSettings` holds all of it for one machine. It makes the policy and the limits that a migration
begins with, and hands what is changed later to the one that runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import AutoConverge, DowntimeLimit, FirstOf, Limits, Policy, Saving
from kvmmig.monitor.policies import PolicyChoice
from kvmmig.monitor.qemu_parameters import ALWAYS_OFF, DEFAULTS, QemuParameters
from kvmmig.qmp import QMPError
from kvmmig.qmp.messages import shortened
from kvmmig.units import DOWNTIME_LIMIT, MAX_BANDWIDTH, NO_TIMEOUT_OR, PERCENT, SETUP_TIMEOUT, STALL_TIMEOUT


class MigrationParameters(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """All parameters of migrations, as ``query-migrate-parameters`` shows them."""

    #: Bytes a second; 0 is no limit.
    max_bandwidth: int = 0
    #: Milliseconds.
    downtime_limit: int = 300
    # Per cent of the time that auto-converge lets the vCPUs stand still: at first, more each time, at most.
    cpu_throttle_initial: int = 20
    cpu_throttle_increment: int = 10
    max_cpu_throttle: int = 99
    #: Milliseconds for the whole migration; 0 is no limit.
    x_kvmmig_timeout: int = 0
    #: What happens then: the guest is given back, or stopped and moved anyway.
    x_kvmmig_on_timeout: Literal["cancel", "force"] = "cancel"
    #: Not one byte accepted, or none that comes, for so many milliseconds ends the migration.
    x_kvmmig_stall_timeout: int = 30_000
    #: Milliseconds for the first words of the other side, which need no more than a moment.
    x_kvmmig_setup_timeout: int = 60_000
    #: The file that migrations, to here too, are recorded to (docs/record.md); empty is none.
    x_kvmmig_record: str = ""
    #: Pages have digests on links too.
    x_kvmmig_page_digests: bool = False


_THROTTLE = "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"


class ParameterChanges(QemuParameters, frozen=True):
    """The arguments of ``migrate-set-parameters``: those of `MigrationParameters` that are to change, and
    those of QEMU's that can't."""

    ranges: ClassVar = {
        **QemuParameters.ranges,
        "max_bandwidth": MAX_BANDWIDTH,
        "downtime_limit": DOWNTIME_LIMIT,
        "cpu_throttle_initial": PERCENT,
        "cpu_throttle_increment": PERCENT,
        "max_cpu_throttle": PERCENT,
        "x_kvmmig_timeout": NO_TIMEOUT_OR,
        "x_kvmmig_stall_timeout": STALL_TIMEOUT,
        "x_kvmmig_setup_timeout": SETUP_TIMEOUT,
    }
    complaints: ClassVar = {  # word for word as QEMU's
        "max_bandwidth": "Parameter 'max-bandwidth' expects uint64",
        "downtime_limit": (
            "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"
        ),
        "cpu_throttle_initial": "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99",
        "cpu_throttle_increment": (
            "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99"
        ),
        "max_cpu_throttle": _THROTTLE,
    }
    max_bandwidth: int | UnsetType = UNSET
    downtime_limit: int | UnsetType = UNSET
    cpu_throttle_initial: int | UnsetType = UNSET
    cpu_throttle_increment: int | UnsetType = UNSET
    max_cpu_throttle: int | UnsetType = UNSET
    x_kvmmig_timeout: int | UnsetType = UNSET
    x_kvmmig_on_timeout: Literal["cancel", "force"] | UnsetType = UNSET
    x_kvmmig_stall_timeout: int | UnsetType = UNSET
    x_kvmmig_setup_timeout: int | UnsetType = UNSET
    x_kvmmig_record: str | UnsetType = UNSET
    x_kvmmig_page_digests: bool | UnsetType = UNSET


#: The capabilities, and whether they are on when nobody has set them. QEMU has all of them: some clients know
#: no others, and fail at one.
CAPABILITIES = {
    "events": False,
    "return-path": True,
    "pause-before-switchover": False,
    "auto-converge": False,
}


class MigrationSettings:
    """Parameters, capabilities and policy of one machine's migrations."""

    def __init__(self) -> None:
        self.parameters = MigrationParameters()
        self.capabilities = dict(CAPABILITIES)
        self.policy = PolicyChoice()
        self._chosen = False
        #: Whether its clients may name transports that start programs. They can't change it.
        self.may_exec = True
        self._live: OutgoingMigration | None = None
        self._live_policy: Policy | None = None

    def change_parameters(self, changes: ParameterChanges) -> None:
        """Take changes over, and hand them to the migration that runs. `QMPError` changes nothing."""
        given = {name: value for name, value in msgspec.structs.asdict(changes).items() if value is not UNSET}
        for name, default in DEFAULTS.items():
            if (value := given.pop(name, default)) != default and not (value is None and default == ""):
                raise QMPError(
                    f"Parameter '{name.replace('_', '-')}' can only be {json.dumps(default)}, QEMU's "
                    "default: it has no effect here"
                )
        parameters = msgspec.structs.replace(self.parameters, **given)
        if parameters.cpu_throttle_initial > parameters.max_cpu_throttle:
            raise QMPError(_THROTTLE)
        self.parameters = parameters
        if self._live is not None and "max_bandwidth" in given:
            self._live.set_bandwidth(parameters.max_bandwidth or None)
        if self._live_policy is not None:
            self._tune(self._live_policy)

    def set_capabilities(self, wanted: list[tuple[str, bool]]) -> None:
        """Switch capabilities on or off. Raises `QMPError`, changing nothing."""
        capabilities = dict(self.capabilities)
        for name, state in wanted:
            if name in ALWAYS_OFF:
                if state:
                    raise QMPError(
                        f"the capability '{name}' can only be off: kvmmig has no such thing; there are "
                        f"{', '.join(CAPABILITIES)}"
                    )
            elif name not in CAPABILITIES:
                raise QMPError(
                    f"Parameter 'capability' does not accept value '{shortened(name)}'; there are "
                    f"{', '.join(CAPABILITIES)}"
                )
            # The way back is used wherever there is one; who does not ask for it gets it too.
            elif name != "return-path":
                capabilities[name] = state
        self.capabilities = capabilities

    def choose_policy(self, choice: PolicyChoice) -> None:
        """Decide by another policy: from the next round on, if a migration runs."""
        self.policy, self._chosen = choice, True
        if self._live is not None:
            self._live_policy = self._make_policy(choice)
            self._live.set_policy(self._live_policy)

    def begin(
        self,
        make: Callable[[Policy, Limits], OutgoingMigration],
        policy: Policy | None = None,
        limits: Limits | None = None,
        *,
        stores: bool = False,
    ) -> OutgoingMigration:
        """A migration made with these, or the policy and the limits of now; changes reach it until `end`.

        Where the transport only ``stores``, and nobody has chosen a policy, it is ``saving``.
        """
        if policy is None:
            choice = PolicyChoice("saving") if stores and not self._chosen else self.policy
            policy = self._make_policy(choice)
        self._live = make(policy, limits if limits is not None else self.limits())
        self._live_policy = policy
        return self._live

    def end(self) -> None:
        """The migration has ended."""
        self._live = self._live_policy = None

    def _make_policy(self, choice: PolicyChoice) -> Policy:
        policy = choice.build()
        if self.capabilities["auto-converge"] and not any(
            isinstance(part, AutoConverge) for part in _parts(policy)
        ):
            policy = FirstOf(policy, AutoConverge())
        self._tune(policy)
        return policy

    def limits(self) -> Limits:
        """What bounds a migration that begins now, and a source from now on."""
        parameters = self.parameters
        return Limits(
            bandwidth=parameters.max_bandwidth or None,
            timeout=parameters.x_kvmmig_timeout / 1000 or None,
            on_timeout=parameters.x_kvmmig_on_timeout,
            stall_timeout=parameters.x_kvmmig_stall_timeout / 1000,
            setup_timeout=parameters.x_kvmmig_setup_timeout / 1000,
            page_digests=parameters.x_kvmmig_page_digests,
        )

    def _tune(self, policy: Policy) -> None:
        parameters = self.parameters
        for part in _parts(policy):
            if isinstance(part, DowntimeLimit | Saving):
                part.seconds = parameters.downtime_limit / 1000
            elif isinstance(part, AutoConverge):
                part.first = parameters.cpu_throttle_initial / 100
                part.step = parameters.cpu_throttle_increment / 100
                part.most = parameters.max_cpu_throttle / 100


def _parts(policy: Policy) -> list[Policy]:
    """The policies that a policy is made of; itself where it is made of none."""
    if isinstance(policy, FirstOf):
        return [part for inner in policy.policies for part in _parts(inner)]
    return [policy]
