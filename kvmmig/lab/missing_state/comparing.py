"""One piece of state is left out, and one looks what becomes of the guest."""

from __future__ import annotations

import re
from dataclasses import dataclass

import trio

from kvmmig.errors import KvmmigError
from kvmmig.guests import find
from kvmmig.lab.missing_state.proof import CONFIG, Proof, copy_memory, move
from kvmmig.lab.missing_state.proofs import HOST_PROOFS, PROOFS
from kvmmig.machine import Machine
from kvmmig.machine.cpu import Ending

#: Seconds for a guest: one that waits for what was left out may wait for ever.
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a guest went on with all of its state, and without one section."""

    guest: str
    #: What it has in that section.
    says: str
    whole: str
    lacking: str


def sections() -> dict[str, str]:
    """The state sections that can be left out, ``cpu/`` for any vCPU's, and what a guest has there."""
    seen: dict[str, str] = {}
    for proof in PROOFS:
        seen.setdefault(proof.section, proof.says)
    return seen | {section: says for section, (_, says) in HOST_PROOFS.items()}


async def compare(section: str) -> list[Comparison]:
    """Move each guest that has something in ``section``, with it and without.

    ``section`` is ``cpu0/xsave`` or ``vm/pit``; there are two vCPUs. Raises `KvmmigError` for one that does
    not exist, or that no guest on this host's KVM can miss. A cancel leaves nothing.
    """
    match = re.fullmatch(r"cpu([01])/(.+)", section)
    name, cpu = (f"cpu/{match[2]}", int(match[1])) if match else (section, 0)
    if name not in sections() or (name.startswith("cpu/") and match is None):
        known = ", ".join(each.replace("cpu/", "cpu0/") for each in sections())
        raise KvmmigError(f"there is no state section {section!r} to leave out; there are {known}")
    with trio.move_on_after(_PATIENCE):
        if name in HOST_PROOFS:
            return [await _compare_by_host(name, section, cpu)]
        proofs = [proof for proof in PROOFS if proof.section == name]
        if possible := [proof for proof in proofs if not proof.why_not()]:
            return [await _compare(proof, cpu) for proof in possible]
        raise KvmmigError(f"no guest misses {section} on this host: {proofs[0].why_not()}")
    raise KvmmigError(f"the guest had not come to an end after {_PATIENCE:g} s; try again on a calmer host")


async def _compare(proof: Proof, cpu: int) -> Comparison:
    whole = await move(proof, cpu)
    lacking = await move(proof, cpu, leave_out=proof.name(cpu))
    return Comparison(f"{proof.guest}.asm", proof.says, _words(whole), _words(lacking))


async def _compare_by_host(name: str, section: str, cpu: int) -> Comparison:
    """Where no guest sees it on every KVM, the host looks what a twin holds."""
    prepare, says = HOST_PROOFS[name]
    found = []
    async with Machine.open(CONFIG) as source:
        await source.load(find("echo").program(memory=CONFIG.memory, cpus=CONFIG.cpus, settings={}))
        await source.start()
        await source.pause()
        prepare(source, cpu)
        captured = await source.capture()
        saved = next(each.data for each in captured if each.name == section)
        for leave_out in ((), (section,)):
            async with Machine.open(CONFIG, description=source.description) as twin:
                copy_memory(source, twin)
                await twin.apply(captured, leave_out=leave_out)
                there = next(each.data for each in await twin.capture() if each.name == section)
            found.append(f"the host finds {'the same' if there == saved else 'another'} value")
    return Comparison("no guest", says, *found)


def _words(ending: Ending) -> str:
    return f"{ending}: {ending.report}" if ending.report else str(ending)
