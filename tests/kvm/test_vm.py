from __future__ import annotations

import errno
import mmap
from collections.abc import Callable

import numpy as np
import pytest

from kvmmig.errors import KvmError, KvmUnsupported
from kvmmig.kvm import Hlt, MmioWrite, System, Vcpu, Vm, abi

pytestmark = pytest.mark.kvm

Guest = Callable[[bytes], Vcpu]
WRITE_5000 = bytes([0xC6, 0x06, 0x00, 0x50, 0x2A, 0xF4])  # mov byte [0x5000], 42; hlt
WRITE_5000_AND_6000 = WRITE_5000[:-1] + bytes([0xC6, 0x06, 0x00, 0x60, 0x2A, 0xF4])


def pages(bitmap: bytes | bytearray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")).tolist())


@pytest.fixture
def logging(vm: Vm, ram: mmap.mmap, ram_address: int) -> Callable[[], None]:
    """Switches the dirty log of `guest`'s memory on."""
    return lambda: vm.set_user_memory_region(0, 0, len(ram), ram_address, abi.KVM_MEM_LOG_DIRTY_PAGES)


def test_what_the_guest_writes_is_in_the_slots_memory(guest: Guest, ram: mmap.mmap) -> None:
    assert guest(WRITE_5000).run() == Hlt()
    assert ram[0x5000] == 42


def test_a_deleted_slot_is_no_memory_any_more(guest: Guest, vm: Vm, ram: mmap.mmap, ram_address: int) -> None:
    vcpu = guest(WRITE_5000)
    vm.set_user_memory_region(0, 0, 0, 0)
    vm.set_user_memory_region(0, 0, 0x5000, ram_address)  # the code, but not the page it writes to
    assert vcpu.run() == MmioWrite(0x5000, b"\x2a")
    assert ram[0x5000] == 0


def test_a_slot_that_overlaps_another_is_named(vm: Vm, ram: mmap.mmap, ram_address: int) -> None:
    vm.set_user_memory_region(0, 0, len(ram), ram_address)
    with pytest.raises(
        KvmError, match=r"memory slot 1 \(4096 bytes at 0x1000\) failed: File exists"
    ) as caught:
        vm.set_user_memory_region(1, 0x1000, 4096, ram_address)
    assert caught.value.operation == "KVM_SET_USER_MEMORY_REGION"
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize(
    "bitmap", [bytearray(32), np.zeros(32, np.uint8), memoryview(bytearray(32)), mmap.mmap(-1, 32)]
)
def test_dirty_log_fills_any_writable_buffer_in_place(
    bitmap: bytearray, guest: Guest, vm: Vm, logging: Callable[[], None]
) -> None:
    vcpu = guest(WRITE_5000)
    logging()
    vcpu.run()
    vm.get_dirty_log(0, bitmap)
    assert pages(bytes(bitmap[:])) == {5}


def test_dirty_log_without_manual_protect_is_cleared_by_reading(
    guest: Guest, vm: Vm, logging: Callable[[], None]
) -> None:
    vcpu = guest(WRITE_5000)
    logging()
    vcpu.run()
    bitmap = bytearray(32)
    vm.get_dirty_log(0, bitmap)
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == set()


def test_manual_protect_starts_with_all_pages_dirty(
    guest: Guest, vm: Vm, logging: Callable[[], None]
) -> None:
    vm.enable_manual_dirty_log_protect()
    guest(WRITE_5000)
    logging()
    bitmap = bytearray(32)
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == set(range(256))


def test_manual_protect_can_start_clean(guest: Guest, vm: Vm, logging: Callable[[], None]) -> None:
    vm.enable_manual_dirty_log_protect(initially_set=False)
    guest(WRITE_5000)
    logging()
    bitmap = bytearray(32)
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == set()


def test_manual_protect_keeps_what_was_not_cleared(guest: Guest, vm: Vm, logging: Callable[[], None]) -> None:
    vm.enable_manual_dirty_log_protect(initially_set=False)
    vcpu = guest(WRITE_5000_AND_6000)
    logging()
    vcpu.run()
    bitmap = bytearray(32)
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == {5, 6}
    only_5 = bytearray(8)
    only_5[0] = 1 << 5
    vm.clear_dirty_log(0, 0, 64, only_5)
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == {6}


def test_a_cleared_page_is_dirty_again_when_it_is_written_again(
    guest: Guest, vm: Vm, logging: Callable[[], None]
) -> None:
    vm.enable_manual_dirty_log_protect()
    vcpu = guest(WRITE_5000)
    logging()
    bitmap = bytearray(32)
    vm.get_dirty_log(0, bitmap)
    vm.clear_dirty_log(0, 0, 256, bitmap)
    vcpu.run()
    vm.get_dirty_log(0, bitmap)
    assert pages(bitmap) == {5}


def test_a_bitmap_too_small_for_the_slot_is_refused(
    guest: Guest, vm: Vm, logging: Callable[[], None]
) -> None:
    guest(WRITE_5000)
    logging()
    with pytest.raises(ValueError, match="memory slot 0 has 31 bytes; 256 pages need 32"):
        vm.get_dirty_log(0, bytearray(31))
    with pytest.raises(ValueError, match="memory slot 0 has 7 bytes; 1 pages need 8"):
        vm.clear_dirty_log(0, 0, 1, bytearray(7))


def test_a_read_only_bitmap_is_refused(vm: Vm) -> None:
    with pytest.raises(TypeError, match="not writable"):
        vm.get_dirty_log(0, memoryview(bytes(32)))


def test_the_dirty_log_of_an_unlogged_slot_is_an_error(guest: Guest, vm: Vm) -> None:
    guest(WRITE_5000)
    with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG for memory slot 0 failed: .*log dirty pages"):
        vm.get_dirty_log(0, bytearray(32))


def test_missing_manual_protect_is_unsupported(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vm, "check_extension", lambda self, cap: 1)  # the cap, but without "initially set"
    vm.enable_manual_dirty_log_protect(initially_set=False)
    with pytest.raises(KvmUnsupported, match="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"):
        vm.enable_manual_dirty_log_protect()


def test_enabling_an_unknown_capability_names_it(vm: Vm) -> None:
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP for capability 1000000 failed"):
        vm.enable_cap(1_000_000)


def test_vm_capabilities_agree_with_the_systems(system: System, vm: Vm) -> None:
    assert vm.check_extension(abi.KVM_CAP_NR_MEMSLOTS) == system.check_extension(abi.KVM_CAP_NR_MEMSLOTS)


def test_a_vcpu_id_can_be_used_once(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU for vCPU 0 failed"):
        vm.create_vcpu(0)


@pytest.mark.parametrize(
    "chip_id", [abi.KVM_IRQCHIP_PIC_MASTER, abi.KVM_IRQCHIP_PIC_SLAVE, abi.KVM_IRQCHIP_IOAPIC]
)
def test_irqchip_state_round_trips(vm: Vm, chip_id: int) -> None:
    vm.create_irqchip()
    chip = vm.get_irqchip(chip_id)
    if chip_id == abi.KVM_IRQCHIP_IOAPIC:
        chip.chip.ioapic.redirtbl[3] = 0x10031  # masked, vector 0x31
    else:
        chip.chip.pic.irq_base = 0x28
    vm.set_irqchip(chip)
    assert bytes(vm.get_irqchip(chip_id)) == bytes(chip)


def test_irq_line_reaches_the_pic(vm: Vm) -> None:
    vm.create_irqchip()
    vm.irq_line(4, True)
    assert vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 1 << 4
    vm.irq_line(4, False)
    assert vm.get_irqchip(abi.KVM_IRQCHIP_PIC_MASTER).chip.pic.last_irr == 0


def test_irqchip_state_without_an_irqchip_says_to_create_one(vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"KVM_GET_IRQCHIP for chip 0 failed: .*create the irqchip"):
        vm.get_irqchip(0)


def test_pit_state_round_trips(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_pit2()
    pit = vm.get_pit2()
    pit.channels[2].count = 1234
    pit.channels[2].mode = 3
    vm.set_pit2(pit)
    again = vm.get_pit2()
    assert (again.channels[2].count, again.channels[2].mode) == (1234, 3)


def test_clock_goes_on_from_where_it_was_set(vm: Vm) -> None:
    hour = 3600 * 10**9
    clock = vm.get_clock()
    clock.clock = hour
    clock.flags &= ~abi.KVM_CLOCK_REALTIME
    vm.set_clock(clock)
    assert hour <= vm.get_clock().clock < 2 * hour


def test_clock_flags_that_old_kernels_refuse_are_left_out(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Vm, "_ioctl", lambda self, request, clock: seen.append(clock.flags))
    every = abi.KVM_CLOCK_TSC_STABLE | abi.KVM_CLOCK_HOST_TSC | abi.KVM_CLOCK_REALTIME
    clock = abi.kvm_clock_data(flags=every)
    vm.set_clock(clock)
    assert seen == [abi.KVM_CLOCK_REALTIME]
    assert clock.flags == every


def test_clock_set_with_realtime_adds_the_time_that_passed(vm: Vm) -> None:
    hour = 3600 * 10**9
    clock = vm.get_clock()
    if not clock.flags & abi.KVM_CLOCK_REALTIME:
        pytest.skip("this kernel's KVM_GET_CLOCK does not report real time")
    clock.clock = 0
    clock.realtime -= hour
    vm.set_clock(clock)
    assert hour <= vm.get_clock().clock < 2 * hour


def test_tss_and_identity_map_take_a_place_outside_memory(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFFFBC000)
    vm.set_tss_addr(0xFFFBD000)


def test_identity_map_comes_before_the_first_vcpu(vm: Vm, vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="KVM_SET_IDENTITY_MAP_ADDR for address 0xfffbc000 failed"):
        vm.set_identity_map_addr(0xFFFBC000)


def test_closing_twice_is_fine(system: System) -> None:
    vm = system.create_vm()
    vm.close()
    vm.close()
    assert vm.fileno() == -1
