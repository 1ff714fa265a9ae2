"""What a machine may be, and whether a host can take one that another host describes."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.errors import BadConfig, StateMismatch
from kvmmig.kvm import CpuidEntry, System
from kvmmig.kvm.abi import KVM_CAP_MAX_VCPUS
from kvmmig.machine import Machine, MachineConfig, MachineDescription
from kvmmig.machine.config import available_memory, describe
from kvmmig.machine.cpuid import for_vcpu, missing_features, register, xcr0

MIB = 1 << 20


def description(**changes: object) -> MachineDescription:
    plain = describe(
        MachineConfig(memory=4 * MIB, name="toy", parameters={"hot": 1}),
        [(1, 0, 0, 1, 2, 3, 4)],
        2_500_000,
        [16],
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("memory", "cpus", "message"),
    [
        (4 * MIB + 4096, 1, "use a multiple of 256 KiB"),
        (MIB // 2, 1, "use 1MiB to 64GiB"),
        (65 << 30, 1, "use 1MiB to 64GiB"),
        (MIB, 0, "a machine's number of vCPUs can't be 0; use 1 to 16"),
        (MIB, 17, "a machine's number of vCPUs can't be 17; use 1 to 16"),
    ],
)
def test_a_machine_that_cannot_exist_is_refused_with_what_would_be_right(
    memory: int, cpus: int, message: str
) -> None:
    with pytest.raises(BadConfig, match=message):
        MachineConfig(memory=memory, cpus=cpus)


class Host(System):
    """A host with a KVM of one's choosing, and no file descriptor."""

    def __init__(
        self, cpuid: list[CpuidEntry] | None = None, msrs: tuple[int, ...] = (16,), caps: int = 1024
    ) -> None:
        self.cpuid = [CpuidEntry(1, 0, 0, 1, 2, 3, 4)] if cpuid is None else cpuid
        self.msrs = msrs
        self.caps = caps

    def check_extension(self, cap: int) -> int:
        return self.caps

    def supported_cpuid(self) -> list[CpuidEntry]:
        return self.cpuid

    def msr_index_list(self) -> list[int]:
        return list(self.msrs)

    def __del__(self) -> None:
        pass


def test_more_memory_than_the_host_has_available_is_refused() -> None:
    available = available_memory()
    if available > 63 << 30:
        pytest.skip("this host has more memory than any machine may have")
    config = MachineConfig(memory=(available // MIB + 2048) * MIB)
    with pytest.raises(BadConfig, match=r"this host has .* available; use less memory"):
        config.check_host(Host())


def test_more_vcpus_than_kvm_gives_are_refused() -> None:
    with pytest.raises(BadConfig, match="has at most 2 vCPUs a machine, not 3"):
        MachineConfig(memory=MIB, cpus=3).check_host(Host(caps=2))


def test_a_description_comes_back_as_it_was_encoded() -> None:
    assert MachineDescription.decode(description().encode()) == description()


def test_a_description_gives_the_configuration_that_it_was_made_from() -> None:
    config = MachineConfig(memory=5 << 30, cpus=3, irqchip=False, name="x", parameters={"a": 1, "b": 2})
    made = describe(config, [], 1000, [])
    assert made.config() == config
    assert made.regions == [(0, 3 << 30), (4 << 30, 2 << 30)]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[1, 2]",
        description().encode().replace(b'"cpus":1', b'"cpus":-1'),
        description().encode().replace(b'"cpus":1', b'"cpus":1,"disks":2'),
        description().encode().replace(b'"name":"toy"', b'"name":"' + b"x" * 201 + b'"'),
    ],
)
def test_what_is_no_description_is_refused_in_one_sentence(data: bytes) -> None:
    with pytest.raises(StateMismatch, match="the source's description of its machine can't be read: "):
        MachineDescription.decode(data)


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_fail_in_another_way(data: bytes) -> None:
    with contextlib.suppress(StateMismatch):
        MachineDescription.decode(data)


def test_a_description_of_an_impossible_machine_is_a_mismatch() -> None:
    with pytest.raises(StateMismatch, match=r"describes a machine that can't be built: .* 256 KiB"):
        description(memory=4 * MIB + 1).config()


def test_a_description_fits_the_host_that_it_was_made_on() -> None:
    description().check_fits(Host())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpuid": [(7, 0, 0, 0, 1 << 5, 0, 0)]}, r"this host's CPU lacks avx2 \(leaf 0x7 ebx bit 5\)"),
        ({"cpuid": [(1, 0, 0, 0, 0, 1 << 14, 0)]}, r"an unnamed feature \(leaf 0x1 ecx bit 14\)"),
        ({"msrs": [16, 0x6E0]}, "this host's KVM lacks the MSRs 0x6e0"),
        ({"regions": [(0, 2 * MIB), (2 * MIB, 2 * MIB)]}, "its RAM is laid out unlike a PC's"),
        ({"devices": {}}, "it lacks the device 'debug-console'"),
        ({"devices": {"floppy": 1}}, "it has a device 'floppy' that is unknown here"),
    ],
)
def test_what_the_host_lacks_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StateMismatch, match=message) as caught:
        description(**changes).check_fits(Host())
    assert str(caught.value).startswith("the guest 'toy' can't move here: ")


def test_an_irqchip_that_the_host_lacks_is_named() -> None:
    with pytest.raises(StateMismatch, match="interrupt controller and this host's KVM has none"):
        description().check_fits(Host(caps=0))


def test_a_device_of_another_version_is_named() -> None:
    devices = {**description().devices, "serial": 9}
    with pytest.raises(StateMismatch, match="its device 'serial' has version 9 and here it has version 1"):
        description(devices=devices).check_fits(Host())


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(StateMismatch, match=r"avx2 .*; .* MSRs 0x11"):
        description(cpuid=[(7, 0, 0, 0, 1 << 5, 0, 0)], msrs=[0x11]).check_fits(Host())


def test_what_the_guest_has_switched_on_in_cr4_is_no_feature() -> None:
    assert missing_features([(1, 0, 0, 0, 0, 1 << 27, 0)], []) == []


def test_each_vcpu_gets_its_own_apic_id() -> None:
    cpuid = [(1, 0, 0, 0, 0x01_02_03_04, 0, 0), (0xB, 0, 1, 0, 0, 0, 0), (0x1F, 0, 1, 0, 0, 0, 0)]
    patched = for_vcpu(cpuid, 5)
    assert register(patched, 1, 0, "ebx") == 0x05_02_03_04
    assert register(patched, 0xB, 0, "edx") == register(patched, 0x1F, 0, "edx") == 5


def test_xcr0_has_what_cpuid_offers_but_nothing_without_xsave() -> None:
    assert xcr0([(1, 0, 0, 0, 0, 1 << 26, 0), (0xD, 0, 1, 0x2FF, 0, 0, 0)]) == 0xE7
    assert xcr0([(0xD, 0, 1, 0x2FF, 0, 0, 0)]) == 0


@pytest.mark.kvm
async def test_a_real_machine_describes_itself_and_fits_its_own_host() -> None:
    async with Machine.open(MachineConfig(memory=4 * MIB, cpus=2)) as machine:
        again = MachineDescription.decode(machine.description.encode())
    with System.open() as system:
        assert system.check_extension(KVM_CAP_MAX_VCPUS) >= 2
        again.check_fits(system)
    assert again == machine.description
    assert again.tsc_khz > 0
    assert 0x10 in again.msrs


@pytest.mark.kvm
async def test_a_machine_built_from_a_description_has_its_cpuid() -> None:
    async with Machine.open(MachineConfig(memory=4 * MIB)) as machine:
        pass
    plainer = [
        (f, i, fl, a, b, c & ~(1 << 13) if f == 1 else c, d)
        for f, i, fl, a, b, c, d in machine.description.cpuid
    ]
    given_description = msgspec.structs.replace(machine.description, cpuid=plainer)
    async with Machine.open(machine.config, description=given_description) as twin:
        assert not register(twin.vcpus[0].get_cpuid2(), 1, 0, "ecx") >> 13 & 1
        assert twin.description == given_description


@pytest.mark.kvm
async def test_a_configuration_that_contradicts_the_description_is_refused() -> None:
    async with Machine.open(MachineConfig(memory=4 * MIB)) as machine:
        pass
    with pytest.raises(StateMismatch, match="the source's machine has cpus = 1, and this one is to have 2"):
        async with Machine.open(MachineConfig(memory=4 * MIB, cpus=2), description=machine.description):
            pass
