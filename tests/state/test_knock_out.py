"""Every piece of state matters: a guest that goes on without one of them notices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from kvmmig.cli.app import cli
from kvmmig.errors import StateMismatch
from kvmmig.lab.missing_state.proof import CONFIG, Proof
from kvmmig.lab.missing_state.proofs import HOST_PROOFS, PROOFS
from kvmmig.machine import Machine, MachineConfig
from tests.assembling import need_nasm

from .lab import move_without, state_of

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
    proof: Proof, cpu: int
) -> None:
    whole = await move_without(proof, cpu)
    assert (whole.kind, whole.status) == ("exit", 0), whole.report
    lacking = await move_without(proof, cpu, proof.name(cpu))
    assert (lacking.kind, lacking.status) != ("exit", 0), f"nobody misses {proof.name(cpu)}"


@pytest.mark.kvm
@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("proof", "part"), subjects_in_parts())
async def test_a_guest_misses_a_part_of_a_section(proof: Proof, part: str) -> None:
    lacking = await move_without(proof, 0, proof.name(0), part)
    assert (lacking.kind, lacking.status) != ("exit", 0), f"nobody misses {part} of {proof.section}"


@pytest.mark.kvm
@pytest.mark.parametrize("cpu", [0, 1])
@pytest.mark.parametrize("section", HOST_PROOFS)
async def test_what_no_guest_here_can_see_is_restored_and_is_not_without_its_section(
    section: str, cpu: int
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
                await twin.apply(sections.values(), leave_out={name})
                assert state_of(twin)[name] != sections[name], f"nobody misses {name}"


@pytest.mark.kvm
@pytest.mark.parametrize(("cpus", "irqchip"), [(1, True), (2, True), (1, False), (2, False)])
async def test_there_is_a_proof_for_every_section_that_a_machine_has(cpus: int, irqchip: bool) -> None:
    async with Machine.open(MachineConfig(memory=1 << 20, cpus=cpus, irqchip=irqchip)) as machine:
        captured = {re.sub(r"^cpu\d+/", "cpu/", name) for name in state_of(machine)}
    proven = {proof.section for proof in PROOFS} | HOST_PROOFS.keys()
    for section in sorted(captured - proven):
        pytest.fail(
            f"no proof for section {section}: write a guest that misses it, and its row in "
            "kvmmig/lab/missing_state/proofs.py"
        )
    if irqchip and cpus == 2:
        assert proven <= captured, "there are proofs for what no machine has"


def test_the_document_says_what_is_proven() -> None:
    rows = [line.strip("|").split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    told = {(row[0].strip(" `"), row[1].strip(), row[2].strip(" `")) for row in rows}
    expected = {(proof.section, proof.says, f"{proof.guest}.asm") for proof in PROOFS}
    expected |= {(section, says, "the host") for section, (_, says) in HOST_PROOFS.items()}
    assert told == expected


@pytest.mark.parametrize("guest", sorted({proof.guest for proof in PROOFS}))
def test_a_guest_is_what_nasm_makes_of_its_source(guest: str) -> None:
    need_nasm()
    toy = next(proof for proof in PROOFS if proof.guest == guest).toy()
    assert toy.image == toy.assembled(), f'say "make guests", and commit {guest}.bin'


@pytest.mark.kvm
async def test_what_is_left_out_need_not_be_there_and_must_exist() -> None:
    async with Machine.open(CONFIG) as source:
        sections = state_of(source)
        del sections["cpu0/xsave"]
        async with Machine.open(CONFIG, description=source.description) as twin:
            with pytest.raises(
                StateMismatch, match="has no state section cpu0/fpu to leave out; it has cpu0/"
            ):
                await twin.apply(sections.values(), leave_out={"cpu0/fpu"})
            with pytest.raises(StateMismatch, match="cpu0/xsave are missing"):
                await twin.apply(sections.values())
            await twin.apply(sections.values(), leave_out={"cpu0/xsave"})


@pytest.mark.kvm
@pytest.mark.parametrize("section", ["cpu0/xsave", "vm/pit", "cpu1/xcrs"])
def test_the_command_tells_what_becomes_of_the_guest(section: str) -> None:
    done = CliRunner().invoke(cli, ["lab", "knock-out", section])
    assert done.exit_code == 0, done.exception
    whole, lacking = re.findall(r"^  with(?:out)? it: +(.*)$", done.output, re.MULTILINE)
    assert whole in ("it exited with status 0", "the host finds the same value")
    assert lacking != whole


def test_the_command_lists_what_can_be_left_out_and_refuses_what_can_not() -> None:
    listed = CliRunner().invoke(cli, ["lab", "knock-out"])
    assert {line.split()[0] for line in listed.output.splitlines()} == {
        section.replace("cpu/", "cpu0/") for section in {p.section for p in PROOFS} | HOST_PROOFS.keys()
    }
    for wrong in ("cpu2/regs", "cpu/regs", "cpu0/fpu"):
        done = CliRunner().invoke(cli, ["lab", "knock-out", wrong])
        assert f"there is no state section {wrong!r} to leave out" in str(done.exception)
