from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmmig.errors import KvmError, KvmUnavailable, KvmUnsupported
from kvmmig.kvm import System, abi, cpuid, ioctl

kvm = pytest.mark.kvm


@kvm
def test_api_version_is_12(system: System) -> None:
    assert system.api_version == 12


@kvm
def test_run_area_holds_a_kvm_run_and_whole_pages(system: System) -> None:
    assert system.run_area_size >= 4096
    assert system.run_area_size % 4096 == 0


@kvm
def test_check_extension_knows_user_memory_and_no_nonsense(system: System) -> None:
    assert system.check_extension(abi.KVM_CAP_USER_MEMORY) == 1
    assert system.check_extension(1_000_000) == 0


@kvm
def test_require_returns_the_figure_of_a_capability(system: System) -> None:
    assert system.require(abi.KVM_CAP_MAX_VCPUS, "KVM_CAP_MAX_VCPUS") >= 1


@kvm
def test_require_names_the_missing_capability(system: System) -> None:
    with pytest.raises(KvmUnsupported, match=r"lacks KVM_CAP_TELEPATHY \(capability 1000000\)"):
        system.require(1_000_000, "KVM_CAP_TELEPATHY")


@kvm
def test_supported_cpuid_starts_with_the_vendor_leaf(system: System) -> None:
    first = system.supported_cpuid()[0]
    assert first.function == 0
    vendor = b"".join(register.to_bytes(4, "little") for register in (first.ebx, first.edx, first.ecx))
    assert vendor.isascii()
    assert len(vendor.strip(b"\0")) == 12


@kvm
def test_lists_longer_than_the_first_guess_are_whole(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (len(system.supported_cpuid()), system.msr_index_list(), system.feature_msrs())
    monkeypatch.setattr(cpuid, "_FIRST_GUESS", 1)
    assert (len(system.supported_cpuid()), system.msr_index_list(), system.feature_msrs()) == whole
    assert whole[0] > 2
    assert len(whole[1]) > 2


@kvm
def test_msr_index_list_has_the_tsc(system: System) -> None:
    assert 0x10 in system.msr_index_list()


def test_missing_device_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable, match=r"modprobe kvm_intel .* firmware, .* container") as caught:
        System.open(str(tmp_path / "kvm"))
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_forbidden_device_names_the_kvm_group(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(KvmUnavailable, match="add yourself to the kvm group"):
            System.open(str(device))
    finally:
        os.seteuid(me)


def test_a_file_that_is_not_kvm_is_refused_and_closed() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KvmUnavailable, match="/dev/null is not KVM's device"):
        System.open("/dev/null")
    assert os.listdir("/proc/self/fd") == before


def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "api_version", 11)
    with pytest.raises(KvmUnavailable, match="speaks KVM API version 11, but kvmmig needs 12"):
        System.open("/dev/null")


@kvm
def test_a_cpu_held_by_another_hypervisor_is_said_to_be(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ioctl.ioctl

    def busy(fd: int, request: int, argument: object = None, subject: str = "") -> int:
        if request == ioctl.KVM_CREATE_VM:
            raise ioctl.failure(request, errno.EBUSY)
        return real(fd, request, argument, subject)

    monkeypatch.setattr(ioctl, "ioctl", busy)
    with pytest.raises(KvmUnavailable, match="another hypervisor uses the CPU") as caught:
        system.create_vm()
    assert caught.value.errno == errno.EBUSY


@kvm
def test_a_closed_system_says_so() -> None:
    with System.open() as system:
        pass
    with pytest.raises(KvmError, match=r"KVM_CHECK_EXTENSION failed: Bad file descriptor \(it was closed"):
        system.check_extension(0)


@kvm
def test_contexts_leave_no_descriptor_and_no_mapping() -> None:
    def vcpu_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("anon_inode:kvm-vcpu")

    before = os.listdir("/proc/self/fd")
    with (
        System.open() as system,
        system.create_vm() as vm,
        vm.create_vcpu(0) as vcpu,
        vm.create_vcpu(1) as ap,
    ):
        assert len(os.listdir("/proc/self/fd")) >= len(before) + 4
        assert vcpu_mappings() == 2
    assert os.listdir("/proc/self/fd") == before
    assert vcpu_mappings() == 0  # while the closed vCPUs are still referenced:
    assert vcpu.fileno() == ap.fileno() == -1


@kvm
def test_descriptors_are_not_inherited_by_children(system: System) -> None:
    with system.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        for owner in (system, vm, vcpu):
            assert not os.get_inheritable(owner.fileno())


@kvm
def test_forgetting_to_close_warns() -> None:
    system = System.open()
    with pytest.warns(ResourceWarning, match="System was never closed"):
        del system


def test_the_bindings_need_neither_trio_nor_numpy() -> None:
    check = "import sys, kvmmig.kvm; sys.exit('trio' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
