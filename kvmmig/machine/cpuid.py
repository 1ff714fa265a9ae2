"""CPUID: what a guest's CPU can do, one vCPU's copy of it, and what another host lacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

#: function, index, flags, eax, ebx, ecx, edx: the fields of ``kvm_cpuid_entry2``.
CpuidTuple = tuple[int, int, int, int, int, int, int]

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_TOPOLOGY_LEAVES = (0xB, 0x1F)

# Registers whose bits are features: a set bit is something that a guest may use. (Intel SDM vol. 2, CPUID;
# AMD APM vol. 3, appendix E; kernel: virt/kvm/x86/cpuid.rst for 0x40000001)
_FEATURE_WORDS: tuple[tuple[int, int, str], ...] = (
    (0x1, 0, "ecx"),
    (0x1, 0, "edx"),
    (0x7, 0, "ebx"),
    (0x7, 0, "ecx"),
    (0x7, 0, "edx"),
    (0x7, 1, "eax"),
    (0x7, 1, "edx"),
    (0xD, 0, "eax"),
    (0xD, 1, "eax"),
    (0x40000001, 0, "eax"),
    (0x80000001, 0, "ecx"),
    (0x80000001, 0, "edx"),
    (0x80000007, 0, "edx"),
    (0x80000008, 0, "ebx"),
)

# These mirror CR4 (OSXSAVE, OSPKE): they say what the guest's system has switched on, not what the CPU has.
_NOT_FEATURES = {(0x1, 0, "ecx", 27), (0x7, 0, "ecx", 4)}

_NAMES: dict[tuple[int, int, str, int], str] = {
    (0x1, 0, "ecx", 0): "sse3",
    (0x1, 0, "ecx", 1): "pclmulqdq",
    (0x1, 0, "ecx", 9): "ssse3",
    (0x1, 0, "ecx", 12): "fma",
    (0x1, 0, "ecx", 13): "cx16",
    (0x1, 0, "ecx", 17): "pcid",
    (0x1, 0, "ecx", 19): "sse4.1",
    (0x1, 0, "ecx", 20): "sse4.2",
    (0x1, 0, "ecx", 21): "x2apic",
    (0x1, 0, "ecx", 22): "movbe",
    (0x1, 0, "ecx", 23): "popcnt",
    (0x1, 0, "ecx", 24): "tsc-deadline",
    (0x1, 0, "ecx", 25): "aes",
    (0x1, 0, "ecx", 26): "xsave",
    (0x1, 0, "ecx", 28): "avx",
    (0x1, 0, "ecx", 29): "f16c",
    (0x1, 0, "ecx", 30): "rdrand",
    (0x1, 0, "edx", 4): "tsc",
    (0x1, 0, "edx", 25): "sse",
    (0x1, 0, "edx", 26): "sse2",
    (0x7, 0, "ebx", 0): "fsgsbase",
    (0x7, 0, "ebx", 3): "bmi1",
    (0x7, 0, "ebx", 5): "avx2",
    (0x7, 0, "ebx", 7): "smep",
    (0x7, 0, "ebx", 8): "bmi2",
    (0x7, 0, "ebx", 9): "erms",
    (0x7, 0, "ebx", 10): "invpcid",
    (0x7, 0, "ebx", 16): "avx512f",
    (0x7, 0, "ebx", 17): "avx512dq",
    (0x7, 0, "ebx", 18): "rdseed",
    (0x7, 0, "ebx", 19): "adx",
    (0x7, 0, "ebx", 20): "smap",
    (0x7, 0, "ebx", 28): "avx512cd",
    (0x7, 0, "ebx", 29): "sha",
    (0x7, 0, "ebx", 30): "avx512bw",
    (0x7, 0, "ebx", 31): "avx512vl",
    (0x7, 0, "ecx", 1): "avx512vbmi",
    (0x7, 0, "ecx", 3): "pku",
    (0x7, 0, "ecx", 8): "gfni",
    (0x7, 0, "ecx", 9): "vaes",
    (0x7, 0, "ecx", 10): "vpclmulqdq",
    (0x7, 0, "ecx", 11): "avx512vnni",
    (0x7, 0, "ecx", 16): "la57",
    (0x7, 0, "ecx", 22): "rdpid",
    (0x7, 0, "edx", 4): "fsrm",
    (0x7, 0, "edx", 24): "amx-tile",
    (0x7, 1, "eax", 4): "avx-vnni",
    (0x7, 1, "eax", 5): "avx512-bf16",
    (0xD, 0, "eax", 2): "avx state",
    (0xD, 0, "eax", 5): "avx-512 state",
    (0xD, 1, "eax", 0): "xsaveopt",
    (0xD, 1, "eax", 1): "xsavec",
    (0xD, 1, "eax", 3): "xsaves",
    (0x40000001, 0, "eax", 3): "kvmclock",
    (0x40000001, 0, "eax", 4): "async page faults",
    (0x80000001, 0, "ecx", 5): "lzcnt",
    (0x80000001, 0, "ecx", 6): "sse4a",
    (0x80000001, 0, "edx", 11): "syscall",
    (0x80000001, 0, "edx", 20): "nx",
    (0x80000001, 0, "edx", 26): "1 GiB pages",
    (0x80000001, 0, "edx", 27): "rdtscp",
    (0x80000001, 0, "edx", 29): "64-bit mode",
    (0x80000007, 0, "edx", 8): "invariant tsc",
}


def register(cpuid: Iterable[CpuidTuple], function: int, index: int, name: str) -> int:
    """One register of one leaf; 0 where the leaf is absent."""
    for entry in cpuid:
        if entry[0] == function and entry[1] == index:
            return entry[3 + _REGISTERS.index(name)]
    return 0


def for_vcpu(cpuid: Sequence[CpuidTuple], apic_id: int) -> list[CpuidTuple]:
    """The same leaves with one vCPU's APIC id in them."""
    patched: list[CpuidTuple] = []
    for function, index, flags, eax, ebx, ecx, edx in cpuid:
        if function == 0x1:
            ebx = (ebx & 0x00FFFFFF) | (apic_id << 24)
        elif function in _TOPOLOGY_LEAVES:
            edx = apic_id
        patched.append((function, index, flags, eax, ebx, ecx, edx))
    return patched


def missing_features(wanted: Iterable[CpuidTuple], supported: Iterable[CpuidTuple]) -> list[str]:
    """Names of the features in ``wanted`` that ``supported`` lacks: ``avx2 (leaf 0x7 ebx bit 5)``."""
    wanted, supported = list(wanted), list(supported)
    missing: list[str] = []
    for function, index, name in _FEATURE_WORDS:
        lacking = register(wanted, function, index, name) & ~register(supported, function, index, name)
        for bit in range(32):
            key = (function, index, name, bit)
            if lacking >> bit & 1 and key not in _NOT_FEATURES:
                leaf = f"leaf {function:#x}" + (f".{index}" if index else "")
                missing.append(f"{_NAMES.get(key, 'an unnamed feature')} ({leaf} {name} bit {bit})")
    return missing


def xcr0(cpuid: Iterable[CpuidTuple]) -> int:
    """XCR0 with x87, SSE, AVX and AVX-512, as far as this CPUID has them; 0 when it has no XSAVE at all."""
    cpuid = list(cpuid)
    if not register(cpuid, 0x1, 0, "ecx") >> 26 & 1:
        return 0
    return register(cpuid, 0xD, 0, "eax") & 0b1110_0111
