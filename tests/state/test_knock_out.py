"""Every piece of state matters: a guest that goes on without one of them notices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from kvmmig.machine import Machine, MachineConfig

from .lab import CONFIG, Proof, move, state_of, without
from .proofs import HOST_PROOFS, PROOFS

DOCS = Path(__file__).parents[2] / "docs/state.md"


def subjects() -> list[object]:
    """Each proof on each vCPU; what the VM has once is proven on the first."""
    return [
        pytest.param(proof, cpu, id=f"{proof.guest}-{cpu}")
        for proof in PROOFS
        for cpu in ((0, 1) if proof.section.startswith("cpu/") else (0,))
    ]


def subjects_in_parts() -> list[object]:
    return [
        pytest.param(proof, part, id=f"{proof.guest}-{part.replace(' ', '-')}")
        for proof in PROOFS
        for part in proof.parts
    ]


@pytest.fixture
def possible(proof: Proof) -> None:
    """Skips where this host's KVM rules a proof out."""
    if reason := proof.why_not():
        pytest.skip(reason)


@pytest.mark.kvm
@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("proof", "cpu"), subjects())
async def test_a_guest_finds_all_its_state_and_misses_a_section_that_is_not_restored(
    proof: Proof, cpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await move(proof, cpu, monkeypatch)
    assert (whole.kind, whole.status) == ("exit", 0), whole.report
    lacking = await move(proof, cpu, monkeypatch, lacking=proof.name(cpu))
    assert (lacking.kind, lacking.status) != ("exit", 0), f"nobody misses {proof.name(cpu)}"


@pytest.mark.kvm
@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("proof", "part"), subjects_in_parts())
async def test_a_guest_misses_a_part_of_a_section(
    proof: Proof, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = await move(proof, 0, monkeypatch, lacking=proof.name(0), part=part)
    assert (lacking.kind, lacking.status) != ("exit", 0), f"nobody misses {part} of {proof.section}"


@pytest.mark.kvm
@pytest.mark.parametrize("cpu", [0, 1])
@pytest.mark.parametrize("section", HOST_PROOFS)
async def test_what_no_guest_here_can_see_is_restored_and_is_not_without_its_section(
    section: str, cpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, _ = HOST_PROOFS[section]
    name = section.replace("cpu/", f"cpu{cpu}/")
    with trio.fail_after(60):
        async with Machine.open(CONFIG) as source:
            prepare(source, cpu)
            sections = state_of(source)
            async with Machine.open(CONFIG, description=source.description) as twin:
                await twin.apply(sections.values())
                assert state_of(twin)[name] == sections[name]
            async with Machine.open(CONFIG, description=source.description) as twin:
                with without(name, monkeypatch):
                    await twin.apply(sections.values())
                assert state_of(twin)[name] != sections[name], f"nobody misses {name}"


@pytest.mark.kvm
@pytest.mark.parametrize(("cpus", "irqchip"), [(1, True), (2, True), (1, False), (2, False)])
async def test_there_is_a_proof_for_every_section_that_a_machine_has(cpus: int, irqchip: bool) -> None:
    async with Machine.open(MachineConfig(memory=1 << 20, cpus=cpus, irqchip=irqchip)) as machine:
        captured = {re.sub(r"^cpu\d+/", "cpu/", name) for name in state_of(machine)}
    proven = {proof.section for proof in PROOFS} | HOST_PROOFS.keys()
    for section in sorted(captured - proven):
        pytest.fail(
            f"no proof for section {section}: write a guest that misses it, see tests/state/proofs.py"
        )
    if irqchip and cpus == 2:
        assert proven <= captured, "there are proofs for what no machine has"


def test_the_document_says_what_is_proven() -> None:
    rows = [line.strip("|").split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    told = {(row[0].strip(" `"), row[1].strip(), row[2].strip(" `")) for row in rows}
    expected = {(proof.section, proof.says, f"{proof.guest}.asm") for proof in PROOFS}
    expected |= {(section, says, "the host") for section, (_, says) in HOST_PROOFS.items()}
    assert told == expected
