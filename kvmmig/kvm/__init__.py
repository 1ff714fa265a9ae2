"""Bindings for KVM: `System` (/dev/kvm), `Vm`, `Vcpu`, and the exits of `Vcpu.run`.

Structures and constants are in `kvmmig.kvm.abi`, under the names they have in ``<linux/kvm.h>``.
"""

from __future__ import annotations

from kvmmig.kvm.cpuid import CpuidEntry
from kvmmig.kvm.exits import (
    Debug,
    Exit,
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
)
from kvmmig.kvm.system import System
from kvmmig.kvm.vcpu import Vcpu
from kvmmig.kvm.vm import Vm

__all__ = [
    "CpuidEntry",
    "Debug",
    "Exit",
    "FailEntry",
    "Hlt",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "IrqWindowOpen",
    "MmioRead",
    "MmioWrite",
    "Shutdown",
    "System",
    "SystemEvent",
    "UnknownExit",
    "Vcpu",
    "Vm",
]
