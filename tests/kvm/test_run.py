from __future__ import annotations

import errno
import mmap
import signal
import threading
import time
from collections.abc import Callable

import pytest

from kvmmig.errors import KvmError
from kvmmig.kvm import (
    Debug,
    FailEntry,
    Hlt,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
    UnknownExit,
    Vcpu,
    abi,
    exits,
)

kvm = pytest.mark.kvm
Guest = Callable[[bytes], Vcpu]

HLT = b"\xf4"
DS_FFFF = b"\xb8\xff\xff\x8e\xd8"  # mov ax, 0xffff; mov ds, ax: ds:0010 is 1 MiB, where RAM ends
FOREVER = b"\xeb\xfe"  # jmp to itself


@kvm
def test_a_real_mode_guest_adds_two_numbers(guest: Guest) -> None:
    vcpu = guest(b"\x00\xd8" + HLT)  # add al, bl
    regs = vcpu.get_regs()
    regs.rax, regs.rbx = 40, 2
    vcpu.set_regs(regs)
    assert vcpu.run() == Hlt()
    assert vcpu.get_regs().rax == 42


@kvm
def test_port_write_is_an_io_out(guest: Guest) -> None:
    vcpu = guest(b"\xba\xf8\x03\xb0\x41\xee" + HLT)  # mov dx, 0x3f8; mov al, 'A'; out dx, al
    assert vcpu.run() == IoOut(0x3F8, 1, b"A")
    assert vcpu.run() == Hlt()


@kvm
def test_wide_port_write_carries_all_its_bytes(guest: Guest) -> None:
    vcpu = guest(b"\xb8\x34\x12\xe7\x80" + HLT)  # mov ax, 0x1234; out 0x80, ax
    assert vcpu.run() == IoOut(0x80, 2, b"\x34\x12")


@kvm
def test_string_write_gives_every_item_in_order(guest: Guest, ram: mmap.mmap) -> None:
    ram[0x2000:0x2006] = b"abcdef"
    vcpu = guest(b"\xbe\x00\x20\xb9\x03\x00\xba\xf8\x03\xf3\x6f" + HLT)  # mov si, cx=3, dx; rep outsw
    items: list[bytes] = []
    while isinstance(out := vcpu.run(), IoOut):  # how many a single exit carries is up to the host
        assert (out.port, out.size) == (0x3F8, 2)
        items += out
    assert items == [b"ab", b"cd", b"ef"]
    assert out == Hlt()


def test_a_string_write_of_several_items_is_iterated_item_by_item() -> None:
    assert list(IoOut(0x3F8, 2, b"abcdef")) == [b"ab", b"cd", b"ef"]


@kvm
def test_port_read_gets_the_answer(guest: Guest) -> None:
    vcpu = guest(b"\xe5\x80" + HLT)  # in ax, 0x80
    assert vcpu.run() == IoIn(0x80, 2, 1)
    vcpu.complete_in(b"\x34\x12")
    assert vcpu.run() == Hlt()
    assert vcpu.get_regs().rax & 0xFFFF == 0x1234


@kvm
def test_string_read_puts_every_item_into_memory(guest: Guest, ram: mmap.mmap) -> None:
    vcpu = guest(b"\xbf\x00\x20\xb9\x03\x00\xba\xf8\x03\xf3\x6c" + HLT)  # mov di, cx=3, dx; rep insb
    answer = b"xyz"
    while isinstance(asked := vcpu.run(), IoIn):
        vcpu.complete_in(answer[: asked.count])
        answer = answer[asked.count :]
    assert asked == Hlt()
    assert ram[0x2000:0x2003] == b"xyz"


@kvm
def test_a_write_outside_memory_is_an_mmio_write(guest: Guest) -> None:
    vcpu = guest(DS_FFFF + b"\xc7\x06\x10\x00\x34\x12" + HLT)  # mov word [0x10], 0x1234
    assert vcpu.run() == MmioWrite(0x100000, b"\x34\x12")
    assert vcpu.run() == Hlt()


@kvm
def test_a_read_outside_memory_gets_the_answer(guest: Guest) -> None:
    vcpu = guest(DS_FFFF + b"\xa0\x10\x00" + HLT)  # mov al, [0x10]
    assert vcpu.run() == MmioRead(0x100000, 1)
    vcpu.complete_in(b"\x77")
    assert vcpu.run() == Hlt()
    assert vcpu.get_regs().rax & 0xFF == 0x77


@kvm
def test_an_answer_of_the_wrong_length_is_refused(guest: Guest) -> None:
    vcpu = guest(b"\xe5\x80" + HLT)
    vcpu.run()
    with pytest.raises(ValueError, match="the guest reads 2 bytes, not 3"):
        vcpu.complete_in(b"abc")


@kvm
def test_an_answer_that_nobody_waits_for_is_refused(guest: Guest) -> None:
    vcpu = guest(HLT)
    vcpu.run()
    with pytest.raises(ValueError, match="the guest waits for no answer"):
        vcpu.complete_in(b"a")


@kvm
def test_a_triple_fault_is_a_shutdown(guest: Guest) -> None:
    vcpu = guest(b"\x0f\x0b")  # ud2
    sregs = vcpu.get_sregs()
    sregs.idt.limit = 0
    sregs.cr0 |= 1  # in protected mode, where an interrupt table of no length leads nowhere
    sregs.cs.db = 1
    vcpu.set_sregs(sregs)
    assert vcpu.run() == Shutdown()


@kvm
def test_immediate_exit_interrupts_before_the_first_instruction(guest: Guest) -> None:
    vcpu = guest(b"\x40" + HLT)  # inc ax
    vcpu.request_immediate_exit = True
    assert vcpu.request_immediate_exit
    before = vcpu.get_regs()
    assert vcpu.run() == Interrupted()
    assert bytes(vcpu.get_regs()) == bytes(before)
    vcpu.request_immediate_exit = False
    assert vcpu.run() == Hlt()


@kvm
def test_immediate_exit_completes_a_pending_port_read_first(guest: Guest) -> None:
    vcpu = guest(b"\xe4\x80" + HLT)  # in al, 0x80
    vcpu.run()
    vcpu.complete_in(b"\x55")
    vcpu.request_immediate_exit = True
    assert vcpu.run() == Interrupted()
    regs = vcpu.get_regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x55, 0x1002)


KICK = signal.SIGRTMIN + 3


class Runner:
    """Runs a vCPU in a thread that blocks KICK, until KICK interrupts it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.seen: list[exits.Exit] = []
        self.consumed: int | None = None
        self.first_exit = threading.Event()
        self._thread = threading.Thread(target=self._body)
        self._thread.start()
        assert self.first_exit.wait(60)

    def _body(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK})
        self._vcpu.set_signal_mask(signal.valid_signals() - {KICK})
        while Interrupted() not in self.seen:
            self.seen.append(self._vcpu.run())
            self.first_exit.set()
        info = signal.sigtimedwait({KICK}, 0)
        self.consumed = info.si_signo if info else None

    def kick(self) -> None:
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, KICK)
        self._thread.join(60)
        assert not self._thread.is_alive()


@kvm
def test_a_blocked_signal_that_the_mask_lets_through_ends_run_and_stays_pending(guest: Guest) -> None:
    runner = Runner(guest(b"\xe6\x80" + FOREVER))  # out 0x80, al
    runner.kick()
    assert runner.seen == [IoOut(0x80, 1, b"\0"), Interrupted()]
    assert runner.consumed == KICK


@kvm
def test_run_lets_go_of_the_gil(guest: Guest, ram: mmap.mmap) -> None:
    runner = Runner(guest(b"\xe6\x80\xfe\x06\x00\x20\xeb\xfa"))  # out; then: inc byte [0x2000]; jmp back
    deadline = time.monotonic() + 60
    first = ram[0x2000]
    while ram[0x2000] == first:  # this thread sees the guest at work
        assert time.monotonic() < deadline
    runner.kick()


@kvm
def test_no_signal_mask_can_be_asked_for_again(vcpu: Vcpu) -> None:
    vcpu.set_signal_mask(set())
    vcpu.set_signal_mask(None)


@kvm
def test_a_closed_vcpu_says_so(guest: Guest) -> None:
    vcpu = guest(HLT)
    vcpu.close()
    vcpu.close()
    with pytest.raises(KvmError, match=r"KVM_RUN failed: .*it was closed") as caught:
        vcpu.run()
    assert caught.value.errno == errno.EBADF
    with pytest.raises(KvmError, match="this vCPU is closed"):
        vcpu.request_immediate_exit = True


@kvm
def test_a_run_area_that_is_still_held_does_not_stop_close(guest: Guest) -> None:
    vcpu = guest(HLT)
    area = vcpu.run_area
    vcpu.run()
    vcpu.close()
    assert vcpu.fileno() == -1
    assert area.exit_reason == abi.KVM_EXIT_HLT


def decoded(reason: int, **members: dict[str, int]) -> exits.Exit:
    """What a run area with these members of the union decodes to."""
    area = mmap.mmap(-1, 4096)
    run = abi.kvm_run.from_buffer(area)
    for member, values in members.items():
        for name, value in values.items():
            setattr(getattr(run, member), name, value)
    return exits.decode(reason, run, area)


def test_a_port_write_carries_the_bytes_of_all_its_items() -> None:
    values = {"direction": 1, "size": 2, "port": 0x3F8, "count": 3, "data_offset": 2048}
    assert decoded(abi.KVM_EXIT_IO, io=values) == IoOut(0x3F8, 2, bytes(6))


def test_a_failed_entry_carries_the_hardware_reason_and_the_cpu() -> None:
    values = {"hardware_entry_failure_reason": 0x80000021, "cpu": 3}
    assert decoded(abi.KVM_EXIT_FAIL_ENTRY, fail_entry=values) == FailEntry(0x80000021, 3)


def test_an_internal_error_carries_as_many_words_as_the_kernel_gave() -> None:
    values = {"suberror": abi.KVM_INTERNAL_ERROR_EMULATION, "ndata": 2}
    assert decoded(abi.KVM_EXIT_INTERNAL_ERROR, internal=values) == InternalError(1, (0, 0))


def test_a_system_event_carries_its_type() -> None:
    values = {"type": abi.KVM_SYSTEM_EVENT_RESET}
    assert decoded(abi.KVM_EXIT_SYSTEM_EVENT, system_event=values) == SystemEvent(2, 0)


def test_a_debug_exit_carries_the_exception_and_the_place() -> None:
    area = mmap.mmap(-1, 4096)
    run = abi.kvm_run.from_buffer(area)
    run.debug.arch.exception, run.debug.arch.pc = 3, 0x1000
    assert exits.decode(abi.KVM_EXIT_DEBUG, run, area) == Debug(3, 0x1000)


def test_exits_without_content_are_themselves() -> None:
    assert decoded(abi.KVM_EXIT_INTR) == Interrupted()
    assert decoded(abi.KVM_EXIT_IRQ_WINDOW_OPEN) == IrqWindowOpen()


def test_an_exit_that_nobody_knows_keeps_its_number() -> None:
    assert decoded(9999) == UnknownExit(9999)
