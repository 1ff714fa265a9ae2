"""What the proofs of `kvmmig.lab.missing_state` are taken apart with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import trio

from kvmmig.lab.missing_state.proof import Proof, move
from kvmmig.machine import Machine, StateSection, state
from kvmmig.machine.cpu import Ending


async def move_without(proof: Proof, cpu: int, section: str = "", part: str = "") -> Ending:
    """How the guest ends in a twin that lacks a section, or that part of it."""

    def change(twin: Machine, sections: Sequence[StateSection]) -> list[StateSection]:
        spoil, default = proof.parts[part], fresh(twin, section)
        return [replace(s, data=spoil(s.data, default)) if s.name == section else s for s in sections]

    with trio.fail_after(120):
        if part:
            return await move(proof, cpu, change=change)
        return await move(proof, cpu, leave_out=section)


def state_of(machine: Machine) -> dict[str, StateSection]:
    """By name. `Machine.capture` wants a machine that has run, and running it would change its state."""
    parts = machine._board.parts(machine.description)
    return {section.name: section for section in state.capture(parts)}


def fresh(machine: Machine, section: str) -> bytes:
    """What this section is in a machine that has not run."""
    return state_of(machine)[section].data
