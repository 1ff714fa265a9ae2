"""``/dev/kvm``: what this host's KVM can do, and the door to virtual machines."""

from __future__ import annotations

import errno
import os
from typing import Self

from kvmmig.errors import KvmError, KvmUnavailable, KvmUnsupported
from kvmmig.kvm import abi
from kvmmig.kvm import ioctl as io
from kvmmig.kvm.cpuid import CpuidEntry, growing, read_cpuid
from kvmmig.kvm.vm import Vm

_NO_DEVICE = (
    "load the module (modprobe kvm_intel or kvm_amd), enable virtualization in the firmware, or pass the "
    "device into the container (--device /dev/kvm)"
)
_OPEN_HINTS = {
    errno.ENOENT: f"there is no such device; {_NO_DEVICE}",
    errno.ENODEV: f"no KVM module stands behind it; {_NO_DEVICE}",
    errno.ENXIO: f"no KVM module stands behind it; {_NO_DEVICE}",
    errno.EACCES: "permission denied; add yourself to the kvm group (usermod -aG kvm USER) and log in again",
    errno.EPERM: "not permitted; allow the device in the container or the service that this runs in",
    errno.EBUSY: "another hypervisor uses the CPU; end its virtual machines or unload its module first",
}


class System(io.KvmFd):
    """An open ``/dev/kvm``. Closing it leaves the VMs made through it alive.

    >>> with System.open() as system:
    ...     with system.create_vm() as vm:
    ...         ...
    """

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Open KVM's device. Raises `KvmUnavailable`, whose text says what would mend it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = _OPEN_HINTS.get(error.errno or 0, f"{error.strerror}; check what is at that path")
            raise KvmUnavailable(
                f"{path} can't be opened: {hint}", operation="open", errno=error.errno or 0
            ) from error
        system = cls(fd)
        try:
            version = system.api_version
        except KvmError as error:
            system.close()
            raise KvmUnavailable(
                f"{path} is not KVM's device; give the path of the real one, usually /dev/kvm",
                operation=error.operation,
                errno=error.errno,
            ) from error
        if version != abi.KVM_API_VERSION:
            system.close()
            raise KvmUnavailable(
                f"{path} speaks KVM API version {version}, but kvmmig needs {abi.KVM_API_VERSION}; "
                "use Linux 2.6.22 or newer",
                operation="KVM_GET_API_VERSION",
            )
        return system

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel since 2007."""
        return self._ioctl(io.KVM_GET_API_VERSION)

    @property
    def run_area_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's run area."""
        return self._ioctl(io.KVM_GET_VCPU_MMAP_SIZE)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where the host lacks ``cap`` (KVM_CAP_...), else 1 or the cap's figure."""
        return self._ioctl(io.KVM_CHECK_EXTENSION, cap)

    def require(self, cap: int, name: str) -> int:
        """As `check_extension`, but raises `KvmUnsupported` that names the capability when it is missing."""
        value = self.check_extension(cap)
        if value == 0:
            raise KvmUnsupported(
                f"this host's KVM lacks {name} (capability {cap}); use a newer kernel, or another host",
                operation="KVM_CHECK_EXTENSION",
            )
        return value

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: the CPUID table of all that this host can give a guest."""
        return read_cpuid(self._fd, io.KVM_GET_SUPPORTED_CPUID)

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the numbers of the MSRs that make up a vCPU's state."""
        return self._msr_list(io.KVM_GET_MSR_INDEX_LIST)

    def feature_msrs(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the numbers of the MSRs that describe the host's features."""
        return self._msr_list(io.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM: an empty VM, which the caller closes.

        Raises `KvmUnavailable` when another hypervisor holds the CPU, `KvmError` for the rest.
        """
        run_area_size = self.run_area_size
        try:
            fd = self._ioctl(io.KVM_CREATE_VM, 0)
        except KvmError as error:
            if error.errno != errno.EBUSY:
                raise
            raise KvmUnavailable(
                f"KVM_CREATE_VM failed: {_OPEN_HINTS[errno.EBUSY]}",
                operation=error.operation,
                errno=error.errno,
            ) from error
        return Vm(fd, run_area_size)

    def _msr_list(self, request: int) -> list[int]:
        head, indices = growing(self._fd, request, abi.kvm_msr_list, abi.u32)
        return list(indices[: head.nmsrs])
