"""Capture and apply: a guest goes on in another machine, and state that does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from kvmmig.errors import KvmError, StateMismatch
from kvmmig.kvm import Vcpu, abi
from kvmmig.machine import Machine, MachineConfig, Program, StateSection, state

from .conftest import SERIAL_INTERRUPTS

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Program]
WaitUntil = Callable[[Callable[[], object]], Awaitable[None]]
SMALL = MachineConfig(memory=4 << 20, name="small")
# Counters that go on by themselves, so that two captures of one paused machine differ in them.
MOVING = {"vm/clock", "vm/pit"}
TSC = 0x10


def copy_memory(source: Machine, destination: Machine) -> None:
    for region in source.memory.regions:
        view = destination.memory.view(region.gpa, region.size)
        view[:] = source.memory.view(region.gpa, region.size)


@asynccontextmanager
async def moved(source: Machine, output: Callable[[bytes], None] | None = None) -> AsyncIterator[Machine]:
    """The twin of a paused machine, not yet started."""
    async with Machine.open(
        source.description.config(), description=source.description, output=output
    ) as destination:
        sections = await source.capture()
        copy_memory(source, destination)
        await destination.apply(sections)
        source.mark_moved()
        yield destination


async def test_a_guest_goes_on_in_another_machine_where_it_was_stopped(
    counter: Program, wait_until: WaitUntil
) -> None:
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(counter)
            await machine.start()
            await wait_until(lambda: len(output) > 300)
            await machine.pause()
            async with moved(machine, output.extend) as destination:
                seen = len(output)
                await destination.start()
                await wait_until(lambda: len(output) > seen + 300)
                await destination.end()
    assert bytes(output) == bytes(index % 256 for index in range(len(output)))


@pytest.mark.parametrize("irqchip", [True, False])
async def test_two_vcpus_go_on_in_another_machine_several_times(
    long64: Assemble, irqchip: bool, wait_until: WaitUntil
) -> None:
    source = "again: inc qword [rdi * 8 + 0x200000]; inc rax; cvtsi2sd xmm5, rax; jmp again"

    def counts(machine: Machine) -> tuple[int, int]:
        first, second = struct.unpack("<QQ", machine.memory.read(0x200000, 16))
        return first, second

    async def go_on(machine: Machine, left: int) -> None:
        before = counts(machine)
        await machine.start()
        await wait_until(lambda: all(now > was for now, was in zip(counts(machine), before, strict=True)))
        await machine.pause()
        if left:
            async with moved(machine) as destination:
                await go_on(destination, left - 1)
            return
        for vcpu, count in zip(machine.vcpus, counts(machine), strict=True):
            assert vcpu.get_regs().rax in (count, count - 1)
            (shown,) = struct.unpack("<d", bytes(vcpu.get_fpu().xmm[5])[:8])
            assert shown in (count, count - 1, count - 2)

    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=4 << 20, cpus=2, irqchip=irqchip)) as machine:
            await machine.load(long64(source))
            await go_on(machine, 3)


async def test_what_is_applied_is_captured_again_byte_for_byte(
    long64: Assemble, wait_until: WaitUntil
) -> None:
    source = """
        again: inc qword [rbx + 0x200000]
        inc rax
        cvtsi2sd xmm7, rax
        fld1
        mov edx, eax
        and al, 2
        out 0x92, al
        mov eax, edx
        jmp again
    """
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=4 << 20, cpus=2)) as machine:
            await machine.load(long64(source))
            await machine.start()
            await wait_until(lambda: machine.memory.read(0x200000, 8) != bytes(8))
            machine.serial.feed(b"typed")
            await machine.pause()
            scribble(machine.vcpus[1])
            machine.vm.set_clock(
                abi.kvm_clock_data(clock=10**15)
            )  # kvmclock in ns: 11 days, unlike a fresh one
            pit = machine.vm.get_pit2()
            pit.channels[2].count, pit.channels[2].mode = 0x1234, 3
            machine.vm.set_pit2(pit)
            sections = {section.name: section for section in await machine.capture()}
            async with Machine.open(machine.config, description=machine.description) as destination:
                await destination.apply(sections.values())
                # Not by `capture`, which wants it paused: running it would change what is compared.
                parts = destination._board.parts(destination.description)
                again = {section.name: section for section in state.capture(parts)}
                assert destination.vm.get_clock().clock >= 10**15
                channel = destination.vm.get_pit2().channels[2]
                assert (channel.count, channel.mode) == (0x1234, 3)
    assert sections.keys() == again.keys()
    for name in sections.keys() - MOVING:
        assert without_tsc(again[name]) == without_tsc(sections[name]), name


def scribble(vcpu: Vcpu) -> None:
    """Leave something in each place that a plain guest leaves at its default."""
    lapic = vcpu.get_lapic()
    lapic.regs[0xF1] |= 1  # spurious vector register: APIC enabled
    lapic.regs[0x80] = 0x20  # task priority
    vcpu.set_lapic(lapic)
    sregs = vcpu.get_sregs()
    sregs.cr8 = 2
    vcpu.set_sregs(sregs)
    debugregs = vcpu.get_debugregs()
    debugregs.db[0] = 0x1234
    vcpu.set_debugregs(debugregs)
    vcpu.set_msrs({0x174: 0x5678})  # SYSENTER_CS
    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    vcpu.set_vcpu_events(events)


def without_tsc(section: StateSection) -> StateSection:
    if not section.name.endswith("/msrs"):
        return section
    entries = {index: value for index, value in struct.iter_unpack("<I4xQ", section.data) if index != TSC}
    return dataclasses.replace(section, data=repr(entries).encode())


async def test_an_interrupt_that_was_pending_is_delivered_in_the_other_machine(
    real16: Assemble, wait_until: WaitUntil
) -> None:
    source = f"""{SERIAL_INTERRUPTS}
        mov al, '>'
        out 0xe9, al
        waiting: cmp byte [0x9000], 0
        je waiting
        sti
        again: hlt
        jmp again
        align 0x100
        mov dx, 0x3f8
        in al, dx
        out 0xf4, al
    """
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(real16(source))
            await machine.start()
            await wait_until(lambda: output)
            await machine.feed(b"\x07")  # the line goes up while the guest has interrupts off
            await machine.pause()
            async with moved(machine) as destination:
                destination.memory.write(0x9000, b"\x01")
                await destination.start()
                ending = await destination.wait()
    assert (ending.kind, ending.status) == ("exit", 7)


async def test_a_halted_vcpu_is_still_halted_in_the_other_machine_and_wakes_up_there(
    real16: Assemble,
) -> None:
    source = f"""{SERIAL_INTERRUPTS}
        sti
        hlt
        mov al, 1
        out 0xf4, al
        align 0x100
        mov dx, 0x3f8
        in al, dx
        out 0xe9, al
        mov al, 0x20
        out 0x20, al
        iret
    """
    output = bytearray()

    async def halted(machine: Machine) -> bool:
        await machine.pause()
        if machine.vcpus[0].get_mp_state().mp_state == abi.KVM_MP_STATE_HALTED:
            return True
        await machine.resume()
        return False

    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(real16(source))
            await machine.start()
            while not await halted(machine):
                pass
            async with moved(machine, output.extend) as destination:
                assert destination.vcpus[0].get_mp_state().mp_state == abi.KVM_MP_STATE_HALTED
                await destination.start()
                await destination.feed(b"!")
                ending = await destination.wait()
    assert (ending.kind, ending.status, bytes(output)) == ("exit", 1, b"!")


async def test_input_that_was_typed_but_not_read_moves_with_the_guest(long64: Assemble) -> None:
    source = """
        waiting: cmp byte [0x200000], 0
        je waiting
        again: mov dx, 0x3fd
        in al, dx
        test al, 1
        jz again
        mov dx, 0x3f8
        in al, dx
        out 0xe9, al
        cmp al, 4
        jne again
        out 0xf4, al
    """
    text = bytes(range(65, 91)) * 3  # more than the UART's own 16
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(long64(source))
            await machine.start()
            await machine.feed(text + b"\x04")
            await machine.pause()
            async with moved(machine, output.extend) as destination:
                destination.memory.write(0x200000, b"\x01")
                await destination.start()
                await destination.wait()
    assert bytes(output) == text + b"\x04"


async def test_the_tsc_stands_still_while_the_guest_moves(long64: Assemble, wait_until: WaitUntil) -> None:
    source = "again: rdtsc; mov [0x200000], eax; mov [0x200004], edx; jmp again"
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(long64(source))
            await machine.start()
            await wait_until(lambda: machine.memory.read(0x200000, 8) != bytes(8))
            await machine.pause()
            sections = {section.name: section for section in await machine.capture()}
            saved = dict(struct.iter_unpack("<I4xQ", sections["cpu0/msrs"].data))
            async with moved(machine) as destination:
                await destination.start()
                await wait_until(
                    lambda: destination.memory.read(0x200000, 8) != machine.memory.read(0x200000, 8)
                )
                (first,) = struct.unpack("<Q", destination.memory.read(0x200000, 8))
    assert first >= saved[TSC]


Spoil = Callable[[list[StateSection]], list[StateSection]]


def without(name: str) -> Spoil:
    return lambda sections: [section for section in sections if section.name != name]


def changed(name: str, **fields: object) -> Spoil:
    return lambda sections: [
        dataclasses.replace(section, **fields) if section.name == name else section  # type: ignore[arg-type]  # names come as text
        for section in sections
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("cpu0/lapic"), "the state sections cpu0/lapic are missing"),
        (lambda sections: [*sections, sections[0]], "the state section 'cpu0/tsc-khz' is there twice"),
        (
            lambda sections: [*sections, StateSection("dev/floppy", 1, b"")],
            "this machine has no place for the state sections dev/floppy",
        ),
        (
            changed("cpu0/regs", version=2),
            "the state section 'cpu0/regs' has version 2, and only version 1 is understood here",
        ),
        (
            changed("vm/clock", data=bytes(47)),
            "the state section 'vm/clock' has 47 bytes instead of 48",
        ),
        (changed("dev/serial", data=b""), "the state section 'dev/serial': "),
        (
            changed("vm/ioapic", data=bytes(520)),
            "the state section 'vm/ioapic': it holds the state of chip 0",
        ),
    ],
    ids=["missing", "twice", "unknown", "version", "length", "content", "chip"],
)
async def test_state_that_does_not_fit_is_refused_by_the_name_of_its_section(
    spinner: Program, spoil: Spoil, message: str
) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(spinner)
            await machine.start()
            await machine.pause()
            sections = spoil(await machine.capture())
            async with Machine.open(machine.config, description=machine.description) as destination:
                with pytest.raises(StateMismatch) as caught:
                    await destination.apply(sections)
    assert str(caught.value).startswith(message)


async def test_registers_that_the_cpu_refuses_are_an_error_that_names_the_section(spinner: Program) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(spinner)
            await machine.start()
            await machine.pause()
            sections = {section.name: section for section in await machine.capture()}
            sregs = abi.kvm_sregs.from_buffer_copy(sections["cpu0/sregs"].data)
            sregs.cr4 = 1 << 63
            spoilt = changed("cpu0/sregs", data=bytes(sregs))(list(sections.values()))
            async with Machine.open(machine.config, description=machine.description) as destination:
                with pytest.raises(
                    KvmError, match="the state section 'cpu0/sregs' can't be set: KVM_SET_SREGS"
                ):
                    await destination.apply(spoilt)


async def test_an_msr_that_cannot_be_set_matters_only_if_its_value_differs(spinner: Program) -> None:
    config = MachineConfig(memory=4 << 20, irqchip=False)  # KVM refuses the most without an irqchip
    with trio.fail_after(60):
        async with Machine.open(config) as machine:
            await machine.load(spinner)
            await machine.start()
            await machine.pause()
            sections = await machine.capture()
            (msrs,) = [section for section in sections if section.name == "cpu0/msrs"]
            entries = list(struct.iter_unpack("<IIQ", msrs.data))
            refused = [
                (index, value) for index, _, value in entries if refuses(machine.vcpus[0], index, value)
            ]
            if not refused:
                pytest.skip("this host's KVM takes every MSR that it lists")
            async with Machine.open(machine.config, description=machine.description) as destination:
                await destination.apply(sections)
            index, value = refused[0]
            data = b"".join(struct.pack("<IIQ", i, 0, value ^ 1 if i == index else v) for i, _, v in entries)
            async with Machine.open(machine.config, description=machine.description) as destination:
                with pytest.raises(StateMismatch, match=rf"'cpu0/msrs': this host .* MSR {index:#x} and"):
                    await destination.apply(changed("cpu0/msrs", data=data)(sections))


def refuses(vcpu: Vcpu, index: int, value: int) -> bool:
    try:
        vcpu.set_msrs({index: value})
    except KvmError:
        return True
    return False
