from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from kvmmig.kvm import System, Vcpu, Vm


@pytest.fixture
def system() -> Iterator[System]:
    with System.open() as system:
        yield system


@pytest.fixture
def vm(system: System) -> Iterator[Vm]:
    with system.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    """A vCPU without memory, for what needs none."""
    with vm.create_vcpu(0) as vcpu:
        yield vcpu


@pytest.fixture
def ram() -> mmap.mmap:
    """1 MiB of zeroes, the memory of `guest`."""
    return mmap.mmap(-1, 1 << 20)


@pytest.fixture
def ram_address(ram: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(ram))


@pytest.fixture
def guest(ram: mmap.mmap, ram_address: int, vm: Vm) -> Iterator[Callable[[bytes], Vcpu]]:
    """Makes vCPUs that are about to run the given real-mode code at 0:1000, in `ram` at address 0."""
    vcpus: list[Vcpu] = []

    def make(code: bytes) -> Vcpu:
        ram[0x1000 : 0x1000 + len(code)] = code
        vm.set_user_memory_region(0, 0, len(ram), ram_address)
        vcpu = vm.create_vcpu(len(vcpus))
        vcpus.append(vcpu)
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rflags = 0x1000, 2
        vcpu.set_regs(regs)
        return vcpu

    yield make
    for vcpu in vcpus:
        vcpu.close()
