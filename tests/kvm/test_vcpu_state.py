from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmmig.errors import KvmError
from kvmmig.kvm import System, Vcpu, Vm, abi, cpuid

pytestmark = pytest.mark.kvm


@pytest.fixture
def vcpu(system: System) -> Iterator[Vcpu]:
    """A vCPU as a machine has it: with an irqchip and the host's CPUID."""
    with system.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(system.supported_cpuid())
            yield vcpu


def set_register(regs: Any) -> None:
    regs.r15 = 0x0123_4567_89AB_CDEF


def set_segment(sregs: Any) -> None:
    sregs.fs.base, sregs.cr2 = 0x12345000, 0xABCD


def set_xmm(fpu: Any) -> None:
    fpu.xmm[3][:] = list(range(16))
    fpu.fcw = 0x37F


def set_xsave(xsave: Any) -> None:
    xsave.region[40 + 4] = 0xDEADBEEF  # the lowest word of XMM1, at byte 176
    xsave.region[128] |= 2  # XSTATE_BV: SSE state is there


def set_xcr0(xcrs: Any) -> None:
    xcrs.xcrs[0].value = 3  # x87 and SSE


def set_breakpoint(debugregs: Any) -> None:
    debugregs.db[2] = 0x4000


def set_nmi(events: Any) -> None:
    events.nmi.pending = 1
    events.flags |= abi.KVM_VCPUEVENT_VALID_NMI_PENDING


def set_halted(state: Any) -> None:
    state.mp_state = abi.KVM_MP_STATE_HALTED


def set_spurious_vector(lapic: Any) -> None:
    lapic.regs[0xF0:0xF2] = [0xFF, 0x01]  # vector 0xff, APIC enabled


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("regs", set_register),
        ("sregs", set_segment),
        ("fpu", set_xmm),
        ("xsave", set_xsave),
        ("xcrs", set_xcr0),
        ("debugregs", set_breakpoint),
        ("vcpu_events", set_nmi),
        ("mp_state", set_halted),
        ("lapic", set_spurious_vector),
    ],
)
def test_state_that_was_set_is_read_back(name: str, change: Callable[[Any], None], vcpu: Vcpu) -> None:
    state = getattr(vcpu, f"get_{name}")()
    before = bytes(state)
    change(state)
    assert bytes(state) != before
    getattr(vcpu, f"set_{name}")(state)
    assert bytes(getattr(vcpu, f"get_{name}")()) == bytes(state)


def test_every_msr_of_the_list_can_be_read(system: System, vcpu: Vcpu) -> None:
    indices = system.msr_index_list()
    assert list(vcpu.get_msrs(indices)) == indices


def test_msrs_that_were_set_are_read_back(vcpu: Vcpu) -> None:
    values = {0x174: 0x10, 0x176: 0xFFFF_8000_1234_5678, 0xC0000081: 0x0023_0010_0000_0000}
    vcpu.set_msrs(values)
    assert vcpu.get_msrs(values) == values


def test_no_msrs_at_all_are_fine(vcpu: Vcpu) -> None:
    vcpu.set_msrs({})
    assert vcpu.get_msrs([]) == {}


def test_an_msr_that_cannot_be_read_is_named(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="KVM_GET_MSRS: MSR 0xbeef0001 can't be read") as caught:
        vcpu.get_msrs([0x174, 0xBEEF0001, 0x175])
    assert caught.value.errno == 0


def test_an_msr_that_cannot_be_set_is_named_with_its_value(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="KVM_SET_MSRS: MSR 0xbeef0001 does not take 0x7"):
        vcpu.set_msrs({0x174: 0x11, 0xBEEF0001: 7, 0x175: 0x12})
    assert vcpu.get_msrs([0x174, 0x175]) == {0x174: 0x11, 0x175: 0}


def test_cpuid_that_was_set_is_read_back(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "_FIRST_GUESS", 1)
    table = [
        entry._replace(ebx=0x1234) if entry.function == 0x40000000 else entry for entry in vcpu.get_cpuid2()
    ]
    vcpu.set_cpuid2(table)
    assert vcpu.get_cpuid2() == table
    assert any(entry.ebx == 0x1234 for entry in table)


def test_tsc_frequency_that_was_set_is_read_back(vcpu: Vcpu) -> None:
    khz = vcpu.get_tsc_khz()
    assert khz > 0
    vcpu.set_tsc_khz(khz)
    assert vcpu.get_tsc_khz() == khz


def test_an_impossible_tsc_frequency_is_named(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="KVM_SET_TSC_KHZ for 1 kHz failed"):
        vcpu.set_tsc_khz(1)


def test_kvmclock_ctrl_is_false_for_a_guest_without_kvmclock(vcpu: Vcpu) -> None:
    assert vcpu.kvmclock_ctrl() is False


def test_without_paging_an_address_translates_to_itself(vcpu: Vcpu) -> None:
    assert vcpu.translate(0x1234) == 0x1234


def test_an_address_translates_as_the_guests_page_tables_say(
    vm: Vm, system: System, ram: mmap.mmap, ram_address: int
) -> None:
    vm.set_user_memory_region(0, 0, len(ram), ram_address)
    for at, entry in ((0x7000, 0x8007), (0x8000, 0x9007), (0x9008, 0x87)):  # 2 MiB at 0x200000 -> 0
        ram[at : at + 8] = entry.to_bytes(8, "little")
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(system.supported_cpuid())
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0001, 0x7000, 0x20, 0x500
        sregs.cs.l = 1
        vcpu.set_sregs(sregs)
        assert vcpu.translate(0x200123) == 0x123
        assert vcpu.translate(0x400123) is None


def test_lapic_without_an_irqchip_is_an_error(vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu, pytest.raises(KvmError, match="KVM_GET_LAPIC failed") as caught:
        vcpu.get_lapic()
    assert caught.value.operation == "KVM_GET_LAPIC"
    assert caught.value.errno == errno.EINVAL
