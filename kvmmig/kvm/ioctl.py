"""Request numbers, the one ioctl call, and what an errno means to the person at the keyboard.

The call goes through `ctypes.CDLL`, which lets go of the GIL and reports EINTR as it is. ``fcntl.ioctl``
does neither dependably: it holds the GIL for buffers above 1 KiB, and newer Pythons retry EINTR, so that a
vCPU could not be kicked out of KVM_RUN.
"""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
from types import TracebackType
from typing import Any, Self

from kvmmig.errors import KvmError, KvmUnsupported
from kvmmig.kvm import abi

_KVMIO = 0xAE
_NONE, _WRITE, _READ = 0, 1, 2


def _request(direction: int, number: int, size: int) -> int:
    """A request number as <asm-generic/ioctl.h> builds it: direction, argument size, type, number."""
    return direction << 30 | size << 16 | _KVMIO << 8 | number


def _io(number: int) -> int:
    return _request(_NONE, number, 0)


def _ior(number: int, argument: type[Any]) -> int:
    return _request(_READ, number, ctypes.sizeof(argument))


def _iow(number: int, argument: type[Any]) -> int:
    return _request(_WRITE, number, ctypes.sizeof(argument))


def _iowr(number: int, argument: type[Any]) -> int:
    return _request(_READ | _WRITE, number, ctypes.sizeof(argument))


# /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, abi.kvm_msr_list)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, abi.kvm_cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = _iowr(0x0A, abi.kvm_msr_list)

# a VM
KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _iow(0x42, abi.kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, abi.kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, abi.u64)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, abi.kvm_irq_level)
KVM_GET_IRQCHIP = _iowr(0x62, abi.kvm_irqchip)
KVM_SET_IRQCHIP = _ior(0x63, abi.kvm_irqchip)
KVM_CREATE_PIT2 = _iow(0x77, abi.kvm_pit_config)
KVM_SET_CLOCK = _iow(0x7B, abi.kvm_clock_data)
KVM_GET_CLOCK = _ior(0x7C, abi.kvm_clock_data)
KVM_GET_PIT2 = _ior(0x9F, abi.kvm_pit_state2)
KVM_SET_PIT2 = _iow(0xA0, abi.kvm_pit_state2)
KVM_ENABLE_CAP = _iow(0xA3, abi.kvm_enable_cap)
KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, abi.kvm_clear_dirty_log)

# a vCPU
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, abi.kvm_regs)
KVM_SET_REGS = _iow(0x82, abi.kvm_regs)
KVM_GET_SREGS = _ior(0x83, abi.kvm_sregs)
KVM_SET_SREGS = _iow(0x84, abi.kvm_sregs)
KVM_TRANSLATE = _iowr(0x85, abi.kvm_translation)
KVM_GET_MSRS = _iowr(0x88, abi.kvm_msrs)
KVM_SET_MSRS = _iow(0x89, abi.kvm_msrs)
KVM_SET_SIGNAL_MASK = _iow(0x8B, abi.kvm_signal_mask)
KVM_GET_FPU = _ior(0x8C, abi.kvm_fpu)
KVM_SET_FPU = _iow(0x8D, abi.kvm_fpu)
KVM_GET_LAPIC = _ior(0x8E, abi.kvm_lapic_state)
KVM_SET_LAPIC = _iow(0x8F, abi.kvm_lapic_state)
KVM_SET_CPUID2 = _iow(0x90, abi.kvm_cpuid2)
KVM_GET_CPUID2 = _iowr(0x91, abi.kvm_cpuid2)
KVM_GET_MP_STATE = _ior(0x98, abi.kvm_mp_state)
KVM_SET_MP_STATE = _iow(0x99, abi.kvm_mp_state)
KVM_GET_VCPU_EVENTS = _ior(0x9F, abi.kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = _iow(0xA0, abi.kvm_vcpu_events)
KVM_GET_DEBUGREGS = _ior(0xA1, abi.kvm_debugregs)
KVM_SET_DEBUGREGS = _iow(0xA2, abi.kvm_debugregs)
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_GET_XSAVE = _ior(0xA4, abi.kvm_xsave)
KVM_SET_XSAVE = _iow(0xA5, abi.kvm_xsave)
KVM_GET_XCRS = _ior(0xA6, abi.kvm_xcrs)
KVM_SET_XCRS = _iow(0xA7, abi.kvm_xcrs)
KVM_KVMCLOCK_CTRL = _io(0xAD)

REQUEST_NAMES = {value: name for name, value in globals().items() if name.startswith("KVM_")}

_HINTS = {
    errno.EBADF: "it was closed, or is no file descriptor of this kind; use it before it is closed",
    errno.EEXIST: "there is one already; make it once, and before the vCPUs where it is an irqchip",
    errno.EFAULT: "the kernel could not reach the memory given; keep it mapped while it is in use",
    errno.EINVAL: "the kernel does not take this argument, or not now; compare it with KVM's api.rst",
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
    errno.ENOENT: "there is no such memory slot, or it does not log dirty pages; set it up first",
    errno.ENOMEM: "the host is out of memory; use a smaller guest, or end other programs",
    errno.ENOTTY: "this kernel's KVM does not have it; use a newer kernel",
    errno.ENXIO: "the device it acts on was not created; create the irqchip or the PIT first",
}

#: ``ioctl(2)`` itself: -1 is an error, whose number is in ``ctypes.get_errno()``. Only KVM_RUN needs it bare.
raw_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
raw_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
raw_ioctl.restype = ctypes.c_int


def failure(request: int, number: int, subject: str = "") -> KvmError:
    """The error for an ioctl that failed with errno ``number``; ``subject`` says what it was about."""
    name = REQUEST_NAMES.get(request, hex(request))
    kind = KvmUnsupported if number == errno.ENOTTY else KvmError
    text = f"{name}{' for ' + subject if subject else ''} failed: {os.strerror(number)}"
    if number in _HINTS:
        text += f" ({_HINTS[number]})"
    error = kind(text, operation=name, errno=number)
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def ioctl(fd: int, request: int, argument: Any = None, subject: str = "") -> int:
    """Do ``request`` and return the kernel's answer (>= 0). ``argument``: a number, a structure or nothing.

    An interrupted call is done again. Raises `KvmError`, which names the request, and ``subject``.
    """
    if isinstance(argument, ctypes.Structure):
        argument = ctypes.byref(argument)
    while (answer := raw_ioctl(fd, request, argument)) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise failure(request, number, subject)
    return int(answer)


class KvmFd:
    """A KVM file descriptor and the duty to close it: use it as a context manager, or call `close`."""

    _fd = -1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor's number, for poll or mmap; -1 once it is closed. It stays owned by this object."""
        return self._fd

    def close(self) -> None:
        """Close it. Idempotent. No other thread may be inside a call on it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _ioctl(self, request: int, argument: Any = None, subject: str = "") -> int:
        return ioctl(self._fd, request, argument, subject)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(
                f"{type(self).__name__} was never closed", ResourceWarning, source=self, stacklevel=2
            )
            self.close()
