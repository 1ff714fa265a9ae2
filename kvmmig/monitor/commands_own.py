"""What QEMU has no name for: step and stall figures, page maps, policies, knobs, an operator's word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

import msgspec

import kvmmig
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.policies import POLICIES, PolicyChoice
from kvmmig.monitor.replies import migration_figures, page_map
from kvmmig.qmp import Arguments, CommandTable, NoArguments, QMPError, Session
from kvmmig.units import MAP_BLOCKS


class PageMapArguments(Arguments, frozen=True):
    ranges: ClassVar = {"blocks": MAP_BLOCKS}
    blocks: int = 256


class SetPolicyArguments(Arguments, frozen=True):
    policy: str
    parameters: Mapping[str, float] = msgspec.field(default_factory=dict)


class SetKnobArguments(Arguments, frozen=True):
    name: str
    value: str


def add_own_commands(table: CommandTable, control: MachineControl) -> None:
    """Add them to the table."""

    @table.command("x-kvmmig-query-machine")
    async def query_machine(session: Session, arguments: NoArguments) -> object:
        return describe(control)

    @table.command("x-kvmmig-query-migration")
    async def query_migration(session: Session, arguments: NoArguments) -> object:
        return migration_figures(control)

    @table.command("x-kvmmig-query-page-map", PageMapArguments)
    async def query_page_map(session: Session, arguments: PageMapArguments) -> object:
        reply = page_map(control, arguments.blocks)
        if reply is None:
            raise QMPError("there has been no migration from here, so there is no page map")
        return reply

    @table.command("x-kvmmig-query-policies")
    async def query_policies(session: Session, arguments: NoArguments) -> object:
        return [
            {
                "policy": policy.name,
                "description": policy.description,
                "active": policy.name == control.settings.policy.name,
                "parameters": {
                    name: {
                        "value": control.settings.policy.parameters[name]
                        if policy.name == control.settings.policy.name
                        else default,
                        "default": default,
                        "description": meaning,
                    }
                    for name, (default, _, meaning) in policy.parameters.items()
                },
            }
            for policy in POLICIES
        ]

    @table.command("x-kvmmig-set-policy", SetPolicyArguments)
    async def set_policy(session: Session, arguments: SetPolicyArguments) -> None:
        control.settings.choose_policy(PolicyChoice(arguments.policy, arguments.parameters))

    @table.command("x-kvmmig-query-knobs")
    async def query_knobs(session: Session, arguments: NoArguments) -> object:
        migration = control.outgoing.migration
        knobs = migration.knobs if migration is not None and control.outgoing.active else {}
        return [{"name": name, "value": knob.value()} for name, knob in knobs.items()]

    @table.command("x-kvmmig-set-knob", SetKnobArguments)
    async def set_knob(session: Session, arguments: SetKnobArguments) -> None:
        migration = control.outgoing.migration
        if migration is None or not control.outgoing.active:
            raise QMPError("no migration is running, so there is no knob to turn")
        migration.turn(arguments.name, arguments.value)

    @table.command("x-kvmmig-take-back")
    async def take_back(session: Session, arguments: NoArguments) -> None:
        await control.take_back()


def describe(control: MachineControl) -> dict[str, object]:
    """The machine, for people and for tools that list machines; without a guest, what is known before."""
    described: dict[str, object] = {
        "name": control.name,
        "pid": os.getpid(),
        "version": kvmmig.__version__,
        "status": control.run_state(),
    }
    if control.incoming.uri is not None:
        described["incoming"] = str(control.incoming.uri)
    if control.incoming.peer:
        described["incoming-peer"] = control.incoming.peer
    machine = control.machine
    if machine is not None:
        described |= {
            "guest": machine.config.name,
            "memory": machine.config.memory,
            "cpus": machine.config.cpus,
            "irqchip": machine.config.irqchip,
            "parameters": dict(machine.description.parameters),
            "tsc-khz": machine.description.tsc_khz,
            "regions": [{"gpa": gpa, "size": size} for gpa, size in machine.description.regions],
            "devices": dict(machine.description.devices),
        }
    return described
