"""A virtual machine's file descriptor: memory slots, the dirty log, interrupt controllers, clocks.

One method per ioctl, named after it; the kernel's ``Documentation/virt/kvm/api.rst`` has the fine print.
All of them raise `kvmmig.errors.KvmError`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from kvmmig.errors import KvmUnsupported
from kvmmig.kvm import abi
from kvmmig.kvm import ioctl as io
from kvmmig.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PAGE = 4096


class Vm(io.KvmFd):
    """A VM. Made by `System.create_vm`; close its vCPUs first, then the VM, then unmap the guest's memory."""

    def __init__(self, fd: int, run_area_size: int) -> None:
        super().__init__(fd)
        self._run_area_size = run_area_size
        self._slot_pages: dict[int, int] = {}

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION for this VM: 0 where it lacks ``cap``, else 1 or the capability's figure."""
        return self._ioctl(io.KVM_CHECK_EXTENSION, cap)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP: switch capability ``cap`` on, with up to four arguments."""
        request = abi.kvm_enable_cap(cap=cap)
        request.args[: len(args)] = args
        self._ioctl(io.KVM_ENABLE_CAP, request, f"capability {cap}")

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: a vCPU (``vcpu_id`` is its APIC id), which the caller closes."""
        fd = self._ioctl(io.KVM_CREATE_VCPU, vcpu_id, f"vCPU {vcpu_id}")
        return Vcpu(fd, self._run_area_size)

    # Memory and the dirty log

    def set_user_memory_region(
        self, slot: int, guest_phys_addr: int, memory_size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: make, change or (``memory_size`` 0) delete a memory slot.

        Addresses and size are in bytes and multiples of 4096. ``flags``: KVM_MEM_LOG_DIRTY_PAGES,
        KVM_MEM_READONLY. The memory at ``userspace_addr`` must stay mapped as long as the slot exists.
        """
        region = abi.kvm_userspace_memory_region(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        subject = f"memory slot {slot} ({memory_size} bytes at {guest_phys_addr:#x})"
        self._ioctl(io.KVM_SET_USER_MEMORY_REGION, region, subject)
        self._slot_pages[slot] = memory_size // _PAGE

    def enable_manual_dirty_log_protect(self, initially_set: bool = True) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the dirty log clears nothing, `clear_dirty_log` does.

        ``initially_set``: a slot's log starts with every page dirty, so that switching it on costs nothing.
        Raises `KvmUnsupported` where the kernel lacks it. To be called before any slot logs.
        """
        wanted = abi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if initially_set:
            wanted |= abi.KVM_DIRTY_LOG_INITIALLY_SET
        if wanted & ~self.check_extension(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2):
            raise KvmUnsupported(
                "this host's KVM can't clear the dirty log by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2); "
                "use Linux 5.7 or newer",
                operation="KVM_CHECK_EXTENSION",
            )
        self.enable_cap(abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted)

    def get_dirty_log(self, slot: int, bitmap: WriteableBuffer) -> None:
        """KVM_GET_DIRTY_LOG: one bit a page into ``bitmap``, page 0 in bit 0 of byte 0.

        ``bitmap`` is a writable buffer of at least ``ceil(pages / 64) * 8`` bytes, filled in place. Without
        manual protect this also clears the log. `ValueError`: the buffer is too small for the slot.
        """
        address = _address(bitmap, self._slot_pages.get(slot, 0), slot)
        self._ioctl(io.KVM_GET_DIRTY_LOG, abi.kvm_dirty_log(slot, 0, address), f"memory slot {slot}")

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: WriteableBuffer) -> None:
        """KVM_CLEAR_DIRTY_LOG: mark the pages whose bit is set as clean, and watch for writes again.

        Bit 0 of ``bitmap`` stands for ``first_page``, a multiple of 64; ``num_pages`` is one too, unless it
        goes to the slot's end. Needs `enable_manual_dirty_log_protect`. `ValueError`: the buffer is small.
        """
        address = _address(bitmap, num_pages, slot)
        request = abi.kvm_clear_dirty_log(slot, num_pages, first_page, address)
        self._ioctl(io.KVM_CLEAR_DIRTY_LOG, request, f"memory slot {slot}, {num_pages} pages at {first_page}")

    def set_tss_addr(self, address: int) -> None:
        """KVM_SET_TSS_ADDR: where Intel hosts keep 3 pages of their own, below 4 GiB, in no slot."""
        self._ioctl(io.KVM_SET_TSS_ADDR, address, f"address {address:#x}")

    def set_identity_map_addr(self, address: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: the same for 1 page. Before the first vCPU."""
        self._ioctl(io.KVM_SET_IDENTITY_MAP_ADDR, ctypes.byref(abi.u64(address)), f"address {address:#x}")

    # Interrupt controllers, timer, clock

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: both PICs, the IOAPIC and a local APIC per vCPU. Before the first vCPU."""
        self._ioctl(io.KVM_CREATE_IRQCHIP)

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """KVM_GET_IRQCHIP: the state of one chip, KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        chip = abi.kvm_irqchip(chip_id=chip_id)
        self._ioctl(io.KVM_GET_IRQCHIP, chip, f"chip {chip_id}")
        return chip

    def set_irqchip(self, chip: abi.kvm_irqchip) -> None:
        """KVM_SET_IRQCHIP: put the chip that ``chip.chip_id`` names into this state."""
        self._ioctl(io.KVM_SET_IRQCHIP, chip, f"chip {chip.chip_id}")

    def irq_line(self, irq: int, level: bool) -> None:
        """KVM_IRQ_LINE: raise or lower an interrupt line, of the PICs and the IOAPIC alike."""
        self._ioctl(io.KVM_IRQ_LINE, abi.kvm_irq_level(irq, level), f"IRQ {irq}")

    def create_pit2(self, flags: int = abi.KVM_PIT_SPEAKER_DUMMY) -> None:
        """KVM_CREATE_PIT2: the i8254 timer; by default with port 0x61 too. Needs the irqchip."""
        self._ioctl(io.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=flags))

    def get_pit2(self) -> abi.kvm_pit_state2:
        """KVM_GET_PIT2: the timer's three channels."""
        pit = abi.kvm_pit_state2()
        self._ioctl(io.KVM_GET_PIT2, pit)
        return pit

    def set_pit2(self, pit: abi.kvm_pit_state2) -> None:
        """KVM_SET_PIT2: put the timer into this state; channel 0 starts counting anew."""
        self._ioctl(io.KVM_SET_PIT2, pit)

    def get_clock(self) -> abi.kvm_clock_data:
        """KVM_GET_CLOCK: kvmclock in nanoseconds, and where flags say so, the host's time and TSC with it."""
        clock = abi.kvm_clock_data()
        self._ioctl(io.KVM_GET_CLOCK, clock)
        return clock

    def set_clock(self, clock: abi.kvm_clock_data) -> None:
        """KVM_SET_CLOCK: set kvmclock to ``clock.clock`` nanoseconds.

        With KVM_CLOCK_REALTIME in ``clock.flags`` the real time since ``clock.realtime`` is added to it. The
        other flags, which the kernel reports but does not use (before 5.16 it refuses them), are left out.
        """
        taken = abi.kvm_clock_data.from_buffer_copy(clock)
        taken.flags &= abi.KVM_CLOCK_REALTIME
        self._ioctl(io.KVM_SET_CLOCK, taken)


def _address(bitmap: WriteableBuffer, pages: int, slot: int) -> int:
    """Where the bitmap's bytes are, once it is sure that the kernel won't write or read past its end."""
    needed = (pages + 63) // 64 * 8
    size = memoryview(bitmap).nbytes
    if size < needed:
        raise ValueError(
            f"the bitmap for memory slot {slot} has {size} bytes; {pages} pages need {needed}, "
            "a bit a page in whole 8-byte words"
        )
    return ctypes.addressof(ctypes.c_char.from_buffer(bitmap))
