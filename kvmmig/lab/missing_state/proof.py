"""A guest is stopped in the middle of its work, and goes on in a twin that may lack a piece of its state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from kvmmig.errors import MigrationError
from kvmmig.guests import ToyGuest
from kvmmig.kvm import abi
from kvmmig.lab.missing_state.acts import Spoil
from kvmmig.machine import Entry, Machine, MachineConfig, State, StateSection
from kvmmig.machine.cpu import Ending

CONFIG = MachineConfig(memory=4 << 20, cpus=2, name="subject")
#: Where a guest says that it can be moved; the byte behind it tells it that it was.
READY = {Entry.REAL16: 0x8F00, Entry.LONG64: 0x200000}
# Where a vCPU begins that has not got its registers: there it exits with a status that no guest uses.
_NOWHERE = 0xFFF0
_EXIT_99 = bytes((0xB0, 99, 0xE6, 0xF4))  # mov al, 99; out 0xf4, al: the same in every mode


def _nothing(machine: Machine, cpu: int) -> None:
    return


async def _until_it_ends(machine: Machine, cpu: int) -> Ending:
    return await machine.wait()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A guest that exits with 0 only if a piece of its state came with it.

    ``section`` begins with ``cpu/`` where every vCPU has it; ``says`` is its row in ``docs/state.md``.
    ``parts`` of the section are missed one by one, too.

    What the host does, each with the machine and the number of the vCPU that runs the guest: ``build`` to
    both machines while they are new; ``prepare`` to the source before it starts; ``stopped`` to the source
    when it is paused; ``finish`` to the twin when it was started.
    """

    section: str
    guest: str
    says: str
    parts: Mapping[str, Spoil] = field(default_factory=dict)
    build: Callable[[Machine, int], None] = _nothing
    prepare: Callable[[Machine, int], None] = _nothing
    stopped: Callable[[Machine, int], None] = _nothing
    finish: Callable[[Machine, int], Awaitable[Ending]] = _until_it_ends
    #: What in this host's KVM makes the proof impossible, or nothing.
    why_not: Callable[[], str] = lambda: ""

    def name(self, cpu: int) -> str:
        """The section's name on this vCPU."""
        return self.section.replace("cpu/", f"cpu{cpu}/")

    def toy(self) -> ToyGuest:
        """The guest, assembled."""
        source = Path(__file__).parent / "guests" / f"{self.guest}.asm"
        image = source.with_suffix(".bin").read_bytes()
        return ToyGuest.parse(source.read_text(encoding="utf-8"), str(source), image)


async def move(
    proof: Proof,
    cpu: int,
    *,
    leave_out: str = "",
    change: Callable[[Machine, Sequence[StateSection]], Sequence[StateSection]] | None = None,
) -> Ending:
    """Run the guest on one vCPU of two, stop it, and say how it ends in its twin.

    ``leave_out`` is the section that is not restored there. ``change`` gets the twin and what was captured,
    and returns what is restored. Raises `MigrationError` for a guest that ends before it can be moved.
    """
    guest = proof.toy()
    assert guest.entry is not None
    ready = READY[guest.entry]
    async with Machine.open(CONFIG) as source:
        proof.build(source, cpu)
        await source.load(guest.program(memory=CONFIG.memory, cpus=CONFIG.cpus, settings={}))
        source.memory.write(_NOWHERE, _EXIT_99)
        _only_on(source, cpu)
        proof.prepare(source, cpu)
        await source.start()
        while source.memory.read(ready, 1) == b"\0":
            if source.state is not State.RUNNING:
                raise MigrationError(f"{proof.guest}: before it could be moved, {await source.wait()}")
            await trio.sleep(0.001)
        await source.pause()
        proof.stopped(source, cpu)
        sections: Sequence[StateSection] = await source.capture()
        async with Machine.open(CONFIG, description=source.description) as twin:
            proof.build(twin, cpu)
            copy_memory(source, twin)
            twin.memory.write(ready + 1, b"\1")
            source.mark_moved()
            if change is not None:
                sections = change(twin, sections)
            await twin.apply(sections, leave_out={leave_out} if leave_out else ())
            await twin.start()
            return await proof.finish(twin, cpu)


def copy_memory(source: Machine, twin: Machine) -> None:
    """All of it, while neither runs."""
    for region in source.memory.regions:
        twin.memory.view(region.gpa, region.size)[:] = source.memory.view(region.gpa, region.size)


def _only_on(machine: Machine, cpu: int) -> None:
    """Let the guest run on this vCPU alone; the other one sleeps for ever."""
    first, runs, sleeps = machine.vcpus[0], machine.vcpus[cpu], machine.vcpus[1 - cpu]
    regs, boot, sregs = first.get_regs(), first.get_sregs(), runs.get_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt", "cr0", "cr3", "cr4", "efer"):
        setattr(sregs, name, getattr(boot, name))
    runs.set_sregs(sregs)
    runs.set_regs(regs)
    runs.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
    sleeps.set_regs(abi.kvm_regs(rip=_NOWHERE, rflags=2))  # with interrupts off, so nothing wakes it
    sleeps.set_mp_state(abi.kvm_mp_state(abi.KVM_MP_STATE_HALTED))
