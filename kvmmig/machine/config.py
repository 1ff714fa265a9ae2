"""What a machine is made of: chosen here (`MachineConfig`), or told by the source (`MachineDescription`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Self

import msgspec

from kvmmig.errors import BadConfig, StateMismatch
from kvmmig.kvm.abi import KVM_CAP_IRQCHIP, KVM_CAP_MAX_VCPUS
from kvmmig.machine.cpuid import CpuidTuple, missing_features
from kvmmig.machine.devices import DEVICE_VERSIONS
from kvmmig.machine.memory import MEMORY_UNIT, pc_regions
from kvmmig.machine.populating import Reserve
from kvmmig.units import CPUS, MEMORY, format_size

if TYPE_CHECKING:
    from kvmmig.kvm import System

_U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_Parameter = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
_Name = Annotated[str, msgspec.Meta(max_length=200)]

OnHalt = Literal["end", "stay"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineConfig:
    """A machine to be built. Raises `BadConfig` for one that can't exist on any host.

    ``memory`` is in bytes, ``cpus`` a number of vCPUs; without ``irqchip`` it has no interrupt
    controller. ``name`` is what a guest's check knows it by. ``parameters`` are what a toy guest was
    assembled with; they travel with it, so that its memory can be checked wherever it is. ``on_halt`` says
    what becomes of a guest whose vCPUs can do nothing any more: it ends, or it stays, and travels on so too.
    """

    memory: int
    cpus: int = 1
    irqchip: bool = True
    name: str = "guest"
    parameters: Mapping[str, int] = field(default_factory=dict)
    on_halt: OnHalt = "end"

    def __post_init__(self) -> None:
        try:
            MEMORY.check_whole(self.memory, "a machine's memory")
            CPUS.check_whole(self.cpus, "a machine's number of vCPUs")
        except ValueError as error:
            raise BadConfig(str(error)) from error
        if self.memory % MEMORY_UNIT:
            raise BadConfig(
                f"a machine can't have {self.memory} bytes of memory; "
                f"use a multiple of {MEMORY_UNIT // 1024} KiB"
            )

    def check_host(self, system: System, held: int = 0) -> None:
        """Raise `BadConfig` when this host has not got the memory, or KVM not that many vCPUs.

        ``held`` bytes of memory are this machine's already.
        """
        most = system.check_extension(KVM_CAP_MAX_VCPUS)
        if self.cpus > most:
            raise BadConfig(
                f"{self.name}: this host's KVM has at most {most} vCPUs a machine, not {self.cpus}"
            )
        available = available_memory() + held
        if self.memory > available:
            raise BadConfig(
                f"{self.name}: {format_size(self.memory)} of guest memory are wanted and this host has "
                f"{format_size(available)} available; use less memory"
            )


def reserve_memory(size: int) -> Reserve:
    """Memory for a guest of ``size`` bytes that is yet to come. Raises `BadConfig` for want of room."""
    available = available_memory()
    if size > available:
        raise BadConfig(
            f"{format_size(size)} of memory are to be reserved and this host has {format_size(available)} "
            "available; reserve less"
        )
    return Reserve(size)


def available_memory() -> int:
    """Bytes that new programs can have without swapping: ``MemAvailable`` of proc_meminfo(5)."""
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise BadConfig("/proc/meminfo has no MemAvailable line, so it is unknown how much memory this host has")


class MachineDescription(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """What a stream's hello says of the source's machine; all that the other side needs to build its twin."""

    memory: _Size  # bytes
    regions: Annotated[list[tuple[_Size, _Size]], msgspec.Meta(max_length=64)]  # (guest-physical, bytes)
    cpus: _U32
    irqchip: bool
    name: _Name
    parameters: Annotated[dict[_Name, _Parameter], msgspec.Meta(max_length=100)]
    cpuid: Annotated[list[tuple[_U32, _U32, _U32, _U32, _U32, _U32, _U32]], msgspec.Meta(max_length=512)]
    tsc_khz: _U32
    devices: Annotated[dict[_Name, _U32], msgspec.Meta(max_length=100)]  # name -> version of its state
    msrs: Annotated[list[_U32], msgspec.Meta(max_length=2048)]  # those that the state holds
    on_halt: OnHalt = "end"

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """The reverse of `encode`. Raises `StateMismatch` for anything that is not a description."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StateMismatch(f"the source's description of its machine can't be read: {error}") from error

    def config(self) -> MachineConfig:
        """The machine to build. Raises `StateMismatch` when no such machine can exist."""
        try:
            return MachineConfig(
                memory=self.memory,
                cpus=self.cpus,
                irqchip=self.irqchip,
                name=self.name,
                parameters=dict(self.parameters),
                on_halt=self.on_halt,
            )
        except BadConfig as error:
            raise StateMismatch(f"the source describes a machine that can't be built: {error}") from error

    def check_fits(self, system: System, held: int = 0) -> None:
        """Raise `StateMismatch` when the source's guest can't live on this host, naming every reason.

        ``held`` as for `MachineConfig.check_host`.
        """
        config = self.config()
        reasons: list[str] = []
        if self.regions != [(region.gpa, region.size) for region in pc_regions(config.memory)]:
            reasons.append("its RAM is laid out unlike a PC's, which is the only layout known here")
        if self.irqchip and not system.check_extension(KVM_CAP_IRQCHIP):
            reasons.append("it has an in-kernel interrupt controller and this host's KVM has none")
        supported = system.supported_cpuid()
        if features := missing_features(self.cpuid, supported):
            reasons.append(f"this host's CPU lacks {', '.join(features)}")
        if unknown := sorted(set(self.msrs) - set(system.msr_index_list())):
            reasons.append(f"this host's KVM lacks the MSRs {', '.join(f'{index:#x}' for index in unknown)}")
        reasons += _device_mismatches(self.devices)
        try:
            config.check_host(system, held)
        except BadConfig as error:
            reasons.append(str(error))
        if reasons:
            raise StateMismatch(f"the guest {self.name!r} can't move here: {'; '.join(reasons)}")


def describe(
    config: MachineConfig, cpuid: Iterable[CpuidTuple], tsc_khz: int, msrs: Iterable[int]
) -> MachineDescription:
    """The description of a machine that was built from ``config`` on this host."""
    return MachineDescription(
        memory=config.memory,
        regions=[(region.gpa, region.size) for region in pc_regions(config.memory)],
        cpus=config.cpus,
        irqchip=config.irqchip,
        name=config.name,
        parameters=dict(config.parameters),
        cpuid=list(cpuid),
        tsc_khz=tsc_khz,
        devices=dict(DEVICE_VERSIONS),
        msrs=list(msrs),
        on_halt=config.on_halt,
    )


def _device_mismatches(devices: Mapping[str, int]) -> list[str]:
    reasons = []
    for name in sorted(devices.keys() | DEVICE_VERSIONS.keys()):
        theirs, ours = devices.get(name), DEVICE_VERSIONS.get(name)
        if ours is None:
            reasons.append(f"it has a device {name!r} that is unknown here")
        elif theirs is None:
            reasons.append(f"it lacks the device {name!r} that every machine here has")
        elif theirs != ours:
            reasons.append(f"its device {name!r} has version {theirs} and here it has version {ours}")
    return reasons
