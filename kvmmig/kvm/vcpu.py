"""A vCPU's file descriptor: running it, its registers, and all the rest of its state.

One method per ioctl, named after it; the kernel's ``Documentation/virt/kvm/api.rst`` has the fine print.
All of them raise `kvmmig.errors.KvmError`. The kernel wants a vCPU's ioctls from one thread, the one that
runs it; only `Vcpu.request_immediate_exit` may be set from another.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import TypeVar

from kvmmig.errors import KvmError
from kvmmig.kvm import abi, exits
from kvmmig.kvm import ioctl as io
from kvmmig.kvm.cpuid import CpuidEntry, pack_cpuid, read_cpuid

State = TypeVar("State", bound=ctypes.Structure)


class Vcpu(io.KvmFd):
    """A vCPU and its run area. Made by `Vm.create_vcpu`; close it before its VM."""

    def __init__(self, fd: int, run_area_size: int) -> None:
        """Takes ``fd`` over and maps its run area of ``run_area_size`` bytes."""
        super().__init__(fd)
        try:
            self._area = mmap.mmap(fd, run_area_size)
        except OSError as error:
            super().close()
            number = error.errno or 0
            raise KvmError(
                f"the vCPU's run area can't be mapped: {os.strerror(number)}; free some memory",
                operation="mmap",
                errno=number,
            ) from error
        self._run = abi.kvm_run.from_buffer(self._area)

    def close(self) -> None:
        """Unmap the run area, then close the descriptor. Idempotent. No thread may be inside `run`."""
        if self._fd >= 0:
            del self._run
            # A run_area that somebody still holds keeps the mapping until it is dropped; no more can be done.
            with contextlib.suppress(BufferError):
                self._area.close()
        super().close()

    @property
    def run_area(self) -> abi.kvm_run:
        """The memory shared with the kernel (struct kvm_run). Don't keep it past `close`."""
        if self._fd < 0:
            raise KvmError("this vCPU is closed; use it before it is closed", operation="mmap")
        return self._run

    # Running

    def run(self) -> exits.Exit:
        """KVM_RUN: run the guest in this thread until something needs the host. Lets go of the GIL meanwhile.

        Returns one of `kvmmig.kvm.exits`. `Interrupted` after a signal, or at once (but after a pending port
        or memory access has completed) while `request_immediate_exit` is set.
        """
        while io.raw_ioctl(self._fd, io.KVM_RUN, None) < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return exits.INTERRUPTED
            # EAGAIN: this vCPU waited to be started by another one, and now was.
            if number != errno.EAGAIN:
                raise io.failure(io.KVM_RUN, number)
        return exits.decode(self._run.exit_reason, self._run, self._area)

    def complete_in(self, data: bytes) -> None:
        """Answer the `IoIn` or `MmioRead` that `run` just returned; the guest gets it at the next `run`.

        ``data`` has exactly the bytes asked for, else `ValueError`; so too when no read is pending.
        """
        run = self.run_area
        if run.exit_reason == abi.KVM_EXIT_IO and run.io.direction == abi.KVM_EXIT_IO_IN:
            address, size = ctypes.addressof(run) + run.io.data_offset, run.io.size * run.io.count
        elif run.exit_reason == abi.KVM_EXIT_MMIO and not run.mmio.is_write:
            address, size = ctypes.addressof(run.mmio.data), run.mmio.len
        else:
            raise ValueError("the guest waits for no answer: the last exit was neither IoIn nor MmioRead")
        if len(data) != size:
            raise ValueError(f"the guest reads {size} bytes, not {len(data)}")
        ctypes.memmove(address, data, size)

    @property
    def request_immediate_exit(self) -> bool:
        """While True, `run` completes what is pending and returns `Interrupted`. Any thread may set it.

        It does not stop a `run` that is under way: send that thread a signal too.
        """
        return bool(self.run_area.immediate_exit)

    @request_immediate_exit.setter
    def request_immediate_exit(self, value: bool) -> None:
        self.run_area.immediate_exit = value

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked inside KVM_RUN instead of the thread's own (None).

        A signal that the thread blocks and this mask does not ends KVM_RUN and stays pending: no handler
        is needed.
        """
        if blocked is None:
            self._ioctl(io.KVM_SET_SIGNAL_MASK, None)
            return
        bits = sum(1 << (number - 1) for number in set(blocked))
        mask, sigset = abi.flexible(abi.kvm_signal_mask, abi.u8, 8)
        mask.len = 8
        sigset[:] = list(bits.to_bytes(8, "little"))
        self._ioctl(io.KVM_SET_SIGNAL_MASK, mask)

    # Registers and other state

    def get_regs(self) -> abi.kvm_regs:
        """KVM_GET_REGS: the general registers, RIP and RFLAGS."""
        return self._get(io.KVM_GET_REGS, abi.kvm_regs)

    def set_regs(self, regs: abi.kvm_regs) -> None:
        """KVM_SET_REGS. Drops a pending exception: set the vCPU events after it."""
        self._ioctl(io.KVM_SET_REGS, regs)

    def get_sregs(self) -> abi.kvm_sregs:
        """KVM_GET_SREGS: segments, descriptor tables, control registers, EFER, the APIC's base."""
        return self._get(io.KVM_GET_SREGS, abi.kvm_sregs)

    def set_sregs(self, sregs: abi.kvm_sregs) -> None:
        """KVM_SET_SREGS."""
        self._ioctl(io.KVM_SET_SREGS, sregs)

    def get_fpu(self) -> abi.kvm_fpu:
        """KVM_GET_FPU: x87 and SSE registers; `get_xsave` has these and the newer ones."""
        return self._get(io.KVM_GET_FPU, abi.kvm_fpu)

    def set_fpu(self, fpu: abi.kvm_fpu) -> None:
        """KVM_SET_FPU."""
        self._ioctl(io.KVM_SET_FPU, fpu)

    def get_xsave(self) -> abi.kvm_xsave:
        """KVM_GET_XSAVE: all vector registers, laid out as the host's CPUID leaf 0xd says."""
        return self._get(io.KVM_GET_XSAVE, abi.kvm_xsave)

    def set_xsave(self, xsave: abi.kvm_xsave) -> None:
        """KVM_SET_XSAVE."""
        self._ioctl(io.KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> abi.kvm_xcrs:
        """KVM_GET_XCRS: XCR0, which says what vector state the guest has switched on."""
        return self._get(io.KVM_GET_XCRS, abi.kvm_xcrs)

    def set_xcrs(self, xcrs: abi.kvm_xcrs) -> None:
        """KVM_SET_XCRS. The CPUID must allow the features: set it first."""
        self._ioctl(io.KVM_SET_XCRS, xcrs)

    def get_debugregs(self) -> abi.kvm_debugregs:
        """KVM_GET_DEBUGREGS: DR0 to DR3, DR6 and DR7."""
        return self._get(io.KVM_GET_DEBUGREGS, abi.kvm_debugregs)

    def set_debugregs(self, debugregs: abi.kvm_debugregs) -> None:
        """KVM_SET_DEBUGREGS."""
        self._ioctl(io.KVM_SET_DEBUGREGS, debugregs)

    def get_vcpu_events(self) -> abi.kvm_vcpu_events:
        """KVM_GET_VCPU_EVENTS: exceptions, interrupts and NMIs under way, the interrupt shadow."""
        return self._get(io.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)

    def set_vcpu_events(self, events: abi.kvm_vcpu_events) -> None:
        """KVM_SET_VCPU_EVENTS."""
        self._ioctl(io.KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> abi.kvm_mp_state:
        """KVM_GET_MP_STATE: KVM_MP_STATE_RUNNABLE, ... Read it before registers: it may accept events."""
        return self._get(io.KVM_GET_MP_STATE, abi.kvm_mp_state)

    def set_mp_state(self, state: abi.kvm_mp_state) -> None:
        """KVM_SET_MP_STATE. Without an in-kernel irqchip only KVM_MP_STATE_RUNNABLE is taken."""
        self._ioctl(io.KVM_SET_MP_STATE, state)

    def get_lapic(self) -> abi.kvm_lapic_state:
        """KVM_GET_LAPIC: the local APIC's register page. Needs the in-kernel irqchip."""
        return self._get(io.KVM_GET_LAPIC, abi.kvm_lapic_state)

    def set_lapic(self, lapic: abi.kvm_lapic_state) -> None:
        """KVM_SET_LAPIC. After the SREGS, which carry the APIC's base, and before the MSRs."""
        self._ioctl(io.KVM_SET_LAPIC, lapic)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: MSR number -> value. An MSR that can't be read is a `KvmError` that names it."""
        numbers = list(indices)
        return {entry.index: entry.data for entry in self._msrs(io.KVM_GET_MSRS, dict.fromkeys(numbers, 0))}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS, in the mapping's order. An MSR that can't be set is a `KvmError` that names it.

        Those before it are set by then, those after it are not.
        """
        self._msrs(io.KVM_SET_MSRS, values)

    def get_cpuid2(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2: the CPUID table that the guest sees."""
        return read_cpuid(self._fd, io.KVM_GET_CPUID2)

    def set_cpuid2(self, table: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2: the CPUID table that the guest sees. Before all other state, and before `run`."""
        self._ioctl(io.KVM_SET_CPUID2, pack_cpuid(table))

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the frequency of the guest's TSC in kHz."""
        return self._ioctl(io.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: the frequency of the guest's TSC; far from the host's needs TSC scaling."""
        self._ioctl(io.KVM_SET_TSC_KHZ, khz, f"{khz} kHz")

    def kvmclock_ctrl(self) -> bool:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused. False: it uses no kvmclock, which is fine."""
        try:
            self._ioctl(io.KVM_KVMCLOCK_CTRL)
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def translate(self, address: int) -> int | None:
        """KVM_TRANSLATE: the physical address that the guest's page tables give a linear one, or None."""
        translation = abi.kvm_translation(linear_address=address)
        self._ioctl(io.KVM_TRANSLATE, translation, f"address {address:#x}")
        return int(translation.physical_address) if translation.valid else None

    def _get(self, request: int, kind: type[State]) -> State:
        state = kind()
        self._ioctl(request, state)
        return state

    def _msrs(self, request: int, values: Mapping[int, int]) -> ctypes.Array[abi.kvm_msr_entry]:
        head, entries = abi.flexible(abi.kvm_msrs, abi.kvm_msr_entry, len(values))
        head.nmsrs = len(values)
        entries[:] = [abi.kvm_msr_entry(index, 0, value) for index, value in values.items()]
        handled = self._ioctl(request, head)
        if handled < len(values):
            index = entries[handled].index
            what = "can't be read" if request == io.KVM_GET_MSRS else f"does not take {values[index]:#x}"
            raise KvmError(
                f"{io.REQUEST_NAMES[request]}: MSR {index:#x} {what} on this host; leave it out, or use "
                "a host whose CPU and kernel have it",
                operation=io.REQUEST_NAMES[request],
            )
        return entries
