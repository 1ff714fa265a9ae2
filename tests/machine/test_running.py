"""Guests that run: output, input, endings, several vCPUs, memory beyond 4 GiB, and parking."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from kvmmig.errors import WrongState
from kvmmig.machine import Ending, Machine, MachineConfig, Program

from .conftest import SERIAL_INTERRUPTS

pytestmark = pytest.mark.kvm

Assemble = Callable[[str], Program]
WaitUntil = Callable[[Callable[[], object]], Awaitable[None]]
SMALL = MachineConfig(memory=4 << 20, name="small")


def counts_on(machine: Machine, before: bytes) -> Callable[[], bool]:
    """Has the quadword at 2 MiB left this value?"""
    return lambda: machine.memory.read(0x200000, 8) != before


def grows(output: bytearray, seen: int) -> Callable[[], bool]:
    return lambda: len(output) > seen


async def run(program: Program, config: MachineConfig = SMALL) -> tuple[Ending, bytes, Machine]:
    """Run a guest to its end. The machine that comes back is closed."""
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(config, output=output.extend) as machine:
            await machine.load(program)
            await machine.start()
            ending = await machine.wait()
    return ending, bytes(output), machine


async def test_a_64_bit_guest_prints_and_ends_with_its_status(long64: Assemble) -> None:
    program = long64(
        "mov dx, 0x3f8; mov al, 'H'; out dx, al; mov al, 'i'; out dx, al; mov al, 3; out 0xf4, al"
    )
    ending, output, _ = await run(program)
    assert (ending, output) == (Ending("exit", 3), b"Hi")


async def test_a_string_instruction_prints_every_byte(long64: Assemble) -> None:
    program = long64(
        """
        mov rsi, 0x200000
        mov dword [rsi], 0x64636261
        mov dx, 0xe9
        mov ecx, 4
        rep outsb
        out 0xf4, al
        """
    )
    _, output, _ = await run(program)
    assert output == b"abcd"


async def test_a_boot_sector_runs_at_7c00_with_the_drive_in_dl(real16: Assemble) -> None:
    source = """
        call next
        next: pop bx
        mov al, bh
        out 0xe9, al
        mov ax, cs
        out 0xe9, al
        mov al, dl
        out 0xf4, al
    """
    ending, output, _ = await run(real16(source))
    assert (ending.status, output) == (0x80, b"\x7c\x00")


async def test_the_64_bit_environment_is_as_promised(long64: Assemble) -> None:
    source = """
        pushfq
        mov rbx, 0x200000
        imul rax, rdi, 64
        add rbx, rax
        mov [rbx], rdi
        mov [rbx + 8], rsi
        mov [rbx + 16], rdx
        mov [rbx + 24], rcx
        mov [rbx + 32], rsp
        pop rax
        mov [rbx + 40], rax
        mov ax, cs
        mov [rbx + 48], ax
        movdqu xmm0, oword [rbx]
        lock inc dword [0x300000]
        wait_for_all: pause
        cmp [0x300000], esi
        jne wait_for_all
        out 0xf4, al
    """
    config = MachineConfig(memory=4 << 20, cpus=2)
    with trio.fail_after(60):
        async with Machine.open(config) as machine:
            await machine.load(long64(source))
            await machine.start()
            assert (await machine.wait()).kind == "exit"
            tops = []
            for index in range(2):
                words = struct.unpack("<6QH", machine.memory.read(0x200000 + 64 * index, 50))
                assert words[:4] == (index, 2, 4 << 20, machine.description.tsc_khz)
                top = words[4] + 8  # one push
                assert top % 16 == 0
                assert 0x1000 < top <= 0x9F000
                tops.append(top)
                # rflags; some KVMs show IF as set at level 3, whatever it was, and RF may come and go
                assert words[5] & ~0x10200 == 2
                assert words[6] & 3 == 3  # privilege level
            assert abs(tops[0] - tops[1]) >= 4096


async def test_the_page_tables_are_never_written_by_the_cpu(long64: Assemble) -> None:
    source = "mov rbx, 0x300000; mov [rbx], rbx; mov rbx, [0x200000]; out 0xe9, al; out 0xf4, al"
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(long64(source))
            before = machine.memory.read(0x1000, 0x4000), machine.memory.read(0x5E000, 0x1000)
            await machine.start()
            await machine.wait()
            assert before == (machine.memory.read(0x1000, 0x4000), machine.memory.read(0x5E000, 0x1000))


async def test_four_vcpus_run_and_one_ends_them_all(long64: Assemble) -> None:
    source = """
        lock inc dword [0x200000]
        again: pause
        cmp dword [0x200000], 4
        jne again
        test edi, edi
        jnz again
        mov al, 9
        out 0xf4, al
    """
    ending, _, _ = await run(long64(source), MachineConfig(memory=4 << 20, cpus=4))
    assert ending == Ending("exit", 9)


async def test_in_real_mode_a_second_vcpu_waits_for_its_startup_interrupt(real16: Assemble) -> None:
    # APIC base: switch to x2APIC. Interrupt command: INIT, then STARTUP at page 8, to APIC id 1.
    source = """
        mov ecx, 0x1b
        rdmsr
        or eax, 0x400
        wrmsr
        mov ecx, 0x830
        mov edx, 1
        mov eax, 0x4500
        wrmsr
        mov eax, 0x4608
        wrmsr
        again: jmp again
        align 0x400
        mov al, 'A'
        out 0xe9, al
        mov al, 5
        out 0xf4, al
    """
    ending, output, _ = await run(real16(source), MachineConfig(memory=4 << 20, cpus=2))
    assert (ending, output) == (Ending("exit", 5), b"A")


async def test_a_boot_sector_enters_32_bit_mode_and_rewrites_memory_above_1_mib(real16: Assemble) -> None:
    # What a boot sector for real hardware does: A20 by port 0x92, a GDT of its own, CR0, a far jump.
    sector = """
        cli
        xor ax, ax
        mov ds, ax
        in al, 0x92
        or al, 2
        and al, 0xfe
        out 0x92, al
        lgdt [0x7d18]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        jmp 8:0x7c80
        align 0x80
        bits 32
        mov eax, 16
        mov ds, eax
        mov ecx, 3
        lap: mov ebx, 0x100000
        page: inc byte [ebx]
        add ebx, 4096
        cmp ebx, 0x800000
        jne page
        mov edx, 0x3f8
        lea eax, [ecx + 64]
        out dx, al
        dec ecx
        jnz lap
        out 0xf4, al
        align 0x80
        dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
        dw 23
        dd 0x7d00
    """
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=8 << 20), output=output.extend) as machine:
            await machine.load(real16(sector))
            await machine.start()
            ending = await machine.wait()
            pages = machine.memory.read(0x100000, 7 << 20)
    assert (ending.kind, bytes(output)) == ("exit", b"CBA")
    assert pages[::4096] == b"\x03" * (7 << 8)
    assert sum(pages) == 3 * (7 << 8)


async def test_memory_beyond_4_gib_is_written_and_read_at_its_own_address(long64: Assemble) -> None:
    source = """
        mov rbx, 0x103fffff8
        mov rax, 0x1122334455667788
        mov [rbx], rax
        mov rbx, 0x100000000
        inc qword [rbx]
        out 0xf4, al
    """
    with trio.fail_after(120):
        async with Machine.open(MachineConfig(memory=(3 << 30) + (64 << 20))) as machine:
            await machine.load(long64(source))
            await machine.start()
            assert (await machine.wait()).kind == "exit"
            assert machine.memory.read(0x103FFFFF8, 8) == bytes.fromhex("8877665544332211")
            assert machine.memory.read(0x100000000, 8) == b"\x01" + bytes(7)


async def test_memory_that_is_not_there_reads_as_all_ones(long64: Assemble) -> None:
    source = "mov rbx, 0x1ff000; mov rax, [rbx + 0x300000]; mov [0x100800], rax; out 0xf4, al"
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=(4 << 20) + (256 << 10))) as machine:
            await machine.load(long64(source))
            await machine.start()
            assert (await machine.wait()).kind == "exit"
            assert machine.memory.read(0x100800, 8) == b"\xff" * 8


async def test_what_is_typed_reaches_the_guest_in_order_and_nothing_is_lost(long64: Assemble) -> None:
    source = """
        again: mov dx, 0x3fd
        in al, dx
        test al, 1
        jz again
        mov dx, 0x3f8
        in al, dx
        cmp al, 4
        je done
        out dx, al
        jmp again
        done: out 0xf4, al
    """
    text = bytes(range(32, 127)) * 50  # more than the input queue holds
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(long64(source))
            await machine.start()
            await machine.feed(text)
            await machine.feed(b"\x04")
            assert (await machine.wait()).status == 4
    assert bytes(output) == text


async def test_what_is_typed_at_a_paused_guest_is_in_its_state_or_waits_until_that_is_settled(
    spinner: Program,
) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine, trio.open_nursery() as nursery:
            await machine.load(spinner)
            await machine.start()
            await machine.pause()
            await machine.feed(b"early")
            sections = {section.name: section for section in await machine.capture()}
            assert sections["dev/serial"].data.endswith(b"early")
            for settle, word in ((machine.forget_capture, b"late"), (machine.resume, b"later")):
                await machine.capture()
                before = machine.serial.save()
                nursery.start_soon(machine.feed, word)
                await trio.testing.wait_all_tasks_blocked()
                assert machine.serial.save() == before
                await settle()
                await trio.testing.wait_all_tasks_blocked()
                assert machine.serial.save().endswith(word)


async def test_typing_ends_with_an_error_when_the_guest_has_ended(quitter: Program) -> None:
    with trio.fail_after(60):
        async with Machine.open(SMALL) as machine:
            await machine.load(quitter)
            await machine.start()
            with pytest.raises(WrongState, match="can't feed 'small': the guest has ended"):
                await machine.feed(bytes(100_000))


INTERRUPT_ECHO = f"""{SERIAL_INTERRUPTS}
    mov al, '>'
    mov dx, 0x3f8
    out dx, al
    sti
    again: hlt
    jmp again
    align 0x100
    mov dx, 0x3f8
    in al, dx
    cmp al, 4
    je done
    out dx, al
    mov al, 0x20
    out 0x20, al
    iret
    done: out 0xf4, al
"""


async def test_a_halted_guest_wakes_up_for_each_typed_byte(real16: Assemble) -> None:
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(real16(INTERRUPT_ECHO))
            await machine.start()
            await machine.feed(b"hello\x04")
            assert (await machine.wait()).status == 4
    assert bytes(output) == b">hello"


async def test_a_halted_guest_is_paused_and_wakes_up_after_it(
    real16: Assemble, wait_until: WaitUntil
) -> None:
    output = bytearray()
    with trio.fail_after(60):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(real16(INTERRUPT_ECHO))
            await machine.start()
            await wait_until(lambda: output)
            for _ in range(20):
                await machine.pause()
                await machine.resume()
            await machine.feed(b"x\x04")
            assert (await machine.wait()).status == 4
    assert bytes(output) == b">x"


async def test_without_an_irqchip_hlt_is_the_end(real16: Assemble) -> None:
    ending, output, _ = await run(
        real16("mov al, 'h'; out 0xe9, al; hlt"), MachineConfig(memory=4 << 20, irqchip=False)
    )
    assert (ending.kind, ending.status, output) == ("halted", 0, b"h")
    assert "halted" in ending.report


async def test_without_an_irqchip_several_vcpus_run(long64: Assemble) -> None:
    source = "lock inc dword [0x200000]; again: cmp dword [0x200000], 2; jne again; out 0xf4, al"
    ending, _, _ = await run(long64(source), MachineConfig(memory=4 << 20, cpus=2, irqchip=False))
    assert ending.kind == "exit"


@pytest.mark.parametrize(
    "source", ["mov al, 1; out 0x92, al; again: jmp again", "mov al, 0xfe; out 0x64, al; again: jmp again"]
)
async def test_asking_for_a_reset_ends_the_guest(real16: Assemble, source: str) -> None:
    ending, _, _ = await run(real16(source))
    assert ending == Ending("reset")


async def test_a20_is_kept_and_read_back(real16: Assemble) -> None:
    ending, _, _ = await run(real16("in al, 0x92; or al, 2; out 0x92, al; in al, 0x92; out 0xf4, al"))
    assert ending.status == 2


async def test_a_triple_fault_ends_in_a_report_not_in_a_traceback(long64: Assemble) -> None:
    ending, _, machine = await run(long64("mov rax, 0x1234; ud2"))
    assert ending.kind == "crash"
    assert "vCPU 0: a triple fault" in ending.report
    assert "rip 0000000000100005" in ending.report
    assert "rax 0000000000001234" in ending.report
    assert "bytes at rip: 0f 0b" in ending.report
    assert "64-bit mode at level 3" in ending.report
    assert machine.state.name == "CLOSED"


async def test_a_jump_out_of_memory_ends_in_a_report(long64: Assemble) -> None:
    ending, _, _ = await run(long64("mov rax, 0x500000; jmp rax"))
    assert ending.kind == "crash"
    assert "rip 0000000000500000" in ending.report
    assert "bytes at rip: unknown" in ending.report


async def test_a_crash_in_real_mode_says_so(real16: Assemble) -> None:
    jump_to_1_mib = "db 0xea, 0x10, 0x00, 0xff, 0xff"
    ending, _, _ = await run(real16(jump_to_1_mib), MachineConfig(memory=1 << 20))
    assert ending.kind == "crash"
    assert "real mode" in ending.report


async def test_an_output_that_raises_ends_the_guest_with_a_report(counter: Program) -> None:
    def broken(data: bytes) -> None:
        raise OSError("the terminal is gone")

    with trio.fail_after(60):
        async with Machine.open(SMALL, output=broken) as machine:
            await machine.load(counter)
            await machine.start()
            ending = await machine.wait()
    assert ending.kind == "crash"
    assert "the terminal is gone" in ending.report


async def test_parking_200_times_loses_and_doubles_no_port_write(
    counter: Program, wait_until: WaitUntil
) -> None:
    output = bytearray()
    with trio.fail_after(120):
        async with Machine.open(SMALL, output=output.extend) as machine:
            await machine.load(counter)
            await machine.start()
            for _ in range(200):
                seen = len(output)
                await wait_until(grows(output, seen))
                await machine.pause()
                paused_at = len(output)
                assert machine.vcpus[0].get_regs().rax & 0xFF in (paused_at % 256, (paused_at - 1) % 256)
                assert len(output) == paused_at
                await machine.resume()
    assert bytes(output) == bytes(index % 256 for index in range(len(output)))


async def test_parking_200_times_loses_no_answer_to_a_port_read(
    long64: Assemble, wait_until: WaitUntil
) -> None:
    # Port 0x92 gives back what was written; a read whose answer got lost would leave the other value in al.
    source = """
        mov cl, 2
        again: mov al, cl
        out 0x92, al
        mov al, 0x55
        in al, 0x92
        cmp al, cl
        jne wrong
        xor cl, 2
        inc qword [0x200000]
        jmp again
        wrong: mov al, 1
        out 0xf4, al
    """
    with trio.fail_after(120):
        async with Machine.open(SMALL) as machine:
            await machine.load(long64(source))
            await machine.start()
            for _ in range(200):
                before = machine.memory.read(0x200000, 8)
                await wait_until(counts_on(machine, before))
                await machine.pause()
                await machine.resume()


async def test_a_paused_guest_does_not_move(spinner: Program) -> None:
    with trio.fail_after(60):
        async with Machine.open(MachineConfig(memory=4 << 20, cpus=2)) as machine:
            await machine.load(spinner)
            await machine.start()
            await machine.pause()
            before = machine.memory.read(0x200000, 8)
            for _ in range(50):
                await trio.to_thread.run_sync(lambda: None)
            assert machine.memory.read(0x200000, 8) == before


def leftovers() -> tuple[set[str], list[str]]:
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("kvmmig")}
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # listdir's own
        if "kvm" in target:
            files.append(target)
    return threads, files


async def test_nothing_is_left_after_close(spinner: Program) -> None:
    async with Machine.open(MachineConfig(memory=4 << 20, cpus=2)) as machine:
        await machine.load(spinner)
        await machine.start()
        assert {"kvmmig vCPU 0", "kvmmig vCPU 1"} <= leftovers()[0]
        assert leftovers()[1]
    assert leftovers() == (set(), [])
    with pytest.raises(ValueError, match="released"):
        machine.memory.read(0, 1)


async def test_nothing_is_left_after_an_exception_or_a_cancel(spinner: Program) -> None:
    async def fail() -> None:
        async with Machine.open(SMALL) as machine:
            await machine.load(spinner)
            await machine.start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    with trio.CancelScope() as scope:
        async with Machine.open(SMALL) as machine:
            await machine.load(spinner)
            await machine.start()
            scope.cancel()
            await trio.sleep_forever()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with Machine.open(SMALL):
            pass
    assert leftovers() == (set(), [])


def test_a_machine_works_when_trio_runs_outside_the_main_thread(quitter: Program) -> None:
    endings = []

    async def main() -> None:
        ending, _, _ = await run(quitter)
        endings.append(ending)

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    thread.join()
    assert endings == [Ending("exit", 42)]
