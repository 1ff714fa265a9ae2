"""A reset: the guest begins again as it was loaded, whatever it has done to its machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from kvmmig import guests
from kvmmig.errors import WrongState
from kvmmig.machine import Machine, MachineConfig, Program, State

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Program]
WaitUntil = Callable[[Callable[[], object]], Awaitable[None]]
MIB = 1 << 20
SMALL = MachineConfig(memory=4 * MIB, name="small")
# Time goes on while a machine is paused; where a host counts it, it is in these.
TIME = {"cpu0/msrs", "vm/clock", "vm/pit"}


async def test_a_reset_guest_has_its_memory_and_its_state_as_right_after_its_load(
    long64: Assemble, wait_until: WaitUntil
) -> None:
    # It leaves something of its own in memory, in the vector registers, and in the UART.
    vandal = long64(
        "mov rbx, 0x200000; mov rax, -1; movq xmm5, rax; mov dx, 0x3ff; mov al, 0x5a; out dx, al;"
        "mov byte [0x100000], 0xcc; again: inc qword [rbx]; jmp again"
    )
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(vandal)
            fresh = bytes(machine.memory.words)
            await machine.start()
            await machine.pause()  # the state of one that has not begun can't be captured, so: the first time
            await machine.reset()
            loaded = {section.name: section.data for section in await machine.capture()}
            await machine.resume()
            await wait_until(lambda: machine.memory.read(0x200000, 8) != bytes(8))
            await machine.pause()
            dirty = {section.name: section.data for section in await machine.capture()}
            assert {"cpu0/regs", "cpu0/xsave", "dev/serial"} <= {
                name for name in loaded if dirty[name] != loaded[name]
            }, "the guest did something"
            await machine.reset()
            again = {section.name: section.data for section in await machine.capture()}
            assert {name for name in loaded if again[name] != loaded[name]} <= TIME
            assert machine.state is State.PAUSED
            assert bytes(machine.memory.words) == fresh
            await machine.resume()
            await wait_until(lambda: machine.memory.read(0x200000, 8) != bytes(8))


async def test_a_reset_guest_that_ran_runs_again_from_its_start(
    long64: Assemble, wait_until: WaitUntil
) -> None:
    output = bytearray()
    once = long64("mov al, 0x41; out 0xe9, al; again: jmp again")
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(once)
            await machine.start()
            await wait_until(lambda: output == b"A")
            await machine.reset()
            assert machine.state is State.RUNNING
            await wait_until(lambda: output == b"AA")


async def test_a_reset_boot_sector_is_back_in_real_mode(real16: Assemble, wait_until: WaitUntil) -> None:
    output = bytearray()
    # It goes to protected mode and stays there.
    sector = real16(
        "mov al, 0x41; out 0xe9, al; cli; lgdt [gdtr]; mov eax, cr0; or al, 1; mov cr0, eax;"
        "mov ax, 8; mov ds, ax; again: jmp again;"
        "gdt: dq 0; dq 0x00cf93000000ffff; gdtr: dw 15; dd gdt"
    )
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(sector)
            await machine.start()
            for times in (1, 2, 3):
                await wait_until(lambda: output == b"A" * times)  # noqa: B023 -- waited for at once
                await machine.reset()


@pytest.mark.parametrize("name", ["dirtier", "registers", "echo"])
async def test_a_toy_guest_works_after_a_reset_as_before(name: str, wait_until: WaitUntil) -> None:
    output = bytearray()
    size, cpus = 16 * MIB, 2 if name == "dirtier" else 1
    settings = {"hot": "1MiB"} if name == "dirtier" else {}
    program = guests.find(name).program(memory=size, cpus=cpus, settings=settings)
    config = MachineConfig(memory=size, cpus=cpus, name=name, parameters=program.parameters)
    with trio.fail_after(60):
        async with Machine.open(config, output=output.extend) as machine:
            await machine.load(program)
            await machine.start()
            for _ in range(3):
                before = len(output)
                if name == "echo":  # its first acts reset the UART, and drop what was typed

                    def answers(before: int = before) -> bool:
                        machine.serial.feed(b"x")
                        return len(output) > before + 3

                    await wait_until(answers)
                else:
                    await wait_until(lambda: len(output) > before + 3)  # noqa: B023
                await machine.reset()
            await machine.pause()
            if name == "dirtier":
                await machine.resume()
                before = len(output)
                await wait_until(lambda: len(output) > before + 3)
                await machine.pause()
                result = await trio.to_thread.run_sync(guests.check_machine, machine)
                assert result is not None
                assert result.ok, result.summary


async def test_a_guest_that_came_by_migration_can_not_be_reset_and_runs_on(
    spinner: Program, wait_until: WaitUntil
) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as source:
            await source.load(spinner)
            await source.start()
            await source.pause()
            sections = await source.capture()
            async with Machine.open(SMALL, description=source.description) as machine:
                machine.memory.words[:] = source.memory.words
                await machine.apply(sections)
                await machine.start()
                with pytest.raises(WrongState, match="no program was loaded here"):
                    await machine.reset()
                assert machine.state is State.RUNNING
                before = machine.memory.read(0x200000, 8)
                await wait_until(lambda: machine.memory.read(0x200000, 8) != before)
