"""The structures and constants of ``<linux/kvm.h>`` that kvmmig uses, under their own names (x86-64).

Every class here has the layout of the C structure of the same name, and a test compiles a C program to hold
them to it. ``bytes(structure)`` is its content, ``kvm_regs.from_buffer_copy(data)`` makes one from such
bytes. A structure that ends in a flexible array is its header only; `flexible` adds the entries.
"""
# ruff: noqa: N801 -- the names are the kernel's

from __future__ import annotations

from ctypes import Array, Structure, Union, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import Any, TypeVar

u8, u16, u32, u64, s64 = c_uint8, c_uint16, c_uint32, c_uint64, c_int64

KVM_API_VERSION = 12

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_MP_STATE = 14
KVM_CAP_PIT2 = 33
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_INTERNAL_ERROR_DATA = 40
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_READONLY_MEM = 81
KVM_CAP_ENABLE_CAP_VM = 98
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_GET_MSR_FEATURES = 153
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_DIRTY_LOG_RING = 192

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_EXIT_UNKNOWN = 0
KVM_EXIT_IO = 2
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_SYSTEM_EVENT = 24

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

KVM_PIT_SPEAKER_DUMMY = 1

KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0

KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5

KVM_IOAPIC_NUM_PINS = 24
KVM_MAX_XCRS = 16

Header = TypeVar("Header", bound=Structure)


def flexible(header: type[Header], entry: type[Any], count: int) -> tuple[Header, Array[Any]]:
    """A zeroed ``header`` and the ``count`` entries of the flexible array that follows it, in one buffer."""
    buffer = bytearray(sizeof(header) + count * sizeof(entry))
    return header.from_buffer(buffer), (entry * count).from_buffer(buffer, sizeof(header))


def _fields(kind: type[Any], names: str) -> list[tuple[str, type[Any]]]:
    return [(name, kind) for name in names.split()]


# The system


class kvm_msr_list(Structure):  # followed by u32 indices[nmsrs]
    _fields_ = (("nmsrs", u32),)


class kvm_cpuid2(Structure):  # followed by kvm_cpuid_entry2 entries[nent]
    _fields_ = (("nent", u32), ("padding", u32))


class kvm_cpuid_entry2(Structure):
    _fields_ = (*_fields(u32, "function index flags eax ebx ecx edx"), ("padding", u32 * 3))


class kvm_enable_cap(Structure):
    _fields_ = (("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64))


# A VM's memory


class kvm_userspace_memory_region(Structure):
    _fields_ = (*_fields(u32, "slot flags"), *_fields(u64, "guest_phys_addr memory_size userspace_addr"))


class kvm_dirty_log(Structure):
    _fields_ = (("slot", u32), ("padding1", u32), ("dirty_bitmap", u64))


class kvm_clear_dirty_log(Structure):
    _fields_ = (("slot", u32), ("num_pages", u32), ("first_page", u64), ("dirty_bitmap", u64))


# A VM's devices


class kvm_irq_level(Structure):
    _fields_ = (("irq", u32), ("level", u32))


class kvm_pic_state(Structure):
    _fields_ = _fields(
        u8,
        "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi "
        "rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask",
    )


class kvm_ioapic_state(Structure):
    _fields_ = (
        ("base_address", u64),
        *_fields(u32, "ioregsel id irr pad"),
        ("redirtbl", u64 * KVM_IOAPIC_NUM_PINS),
    )


class _irqchip_state(Union):
    _fields_ = (("dummy", u8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state))


class kvm_irqchip(Structure):
    _fields_ = (("chip_id", u32), ("pad", u32), ("chip", _irqchip_state))


class kvm_pit_config(Structure):
    _fields_ = (("flags", u32), ("pad", u32 * 15))


class kvm_pit_channel_state(Structure):
    _fields_ = (
        ("count", u32),
        ("latched_count", u16),
        *_fields(u8, "count_latched status_latched status read_state write_state"),
        *_fields(u8, "write_latch rw_mode mode bcd gate"),
        ("count_load_time", s64),
    )


class kvm_pit_state2(Structure):
    _fields_ = (("channels", kvm_pit_channel_state * 3), ("flags", u32), ("reserved", u32 * 9))


class kvm_clock_data(Structure):
    _fields_ = (
        ("clock", u64),
        *_fields(u32, "flags pad0"),
        *_fields(u64, "realtime host_tsc"),
        ("pad", u32 * 4),
    )


# A vCPU's state


class kvm_regs(Structure):
    _fields_ = _fields(u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_segment(Structure):
    _fields_ = (
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *_fields(u8, "type present dpl db s l g avl unusable padding"),
    )


class kvm_dtable(Structure):
    _fields_ = (("base", u64), ("limit", u16), ("padding", u16 * 3))


class kvm_sregs(Structure):
    _fields_ = (
        *_fields(kvm_segment, "cs ds es fs gs ss tr ldt"),
        *_fields(kvm_dtable, "gdt idt"),
        *_fields(u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", u64 * 4),
    )


class kvm_fpu(Structure):
    _fields_ = (
        ("fpr", (u8 * 16) * 8),
        *_fields(u16, "fcw fsw"),
        *_fields(u8, "ftwx pad1"),
        ("last_opcode", u16),
        *_fields(u64, "last_ip last_dp"),
        ("xmm", (u8 * 16) * 16),
        *_fields(u32, "mxcsr pad2"),
    )


class kvm_xsave(Structure):
    _fields_ = (("region", u32 * 1024),)


class kvm_xcr(Structure):
    _fields_ = (("xcr", u32), ("reserved", u32), ("value", u64))


class kvm_xcrs(Structure):
    _fields_ = (*_fields(u32, "nr_xcrs flags"), ("xcrs", kvm_xcr * KVM_MAX_XCRS), ("padding", u64 * 16))


class kvm_debugregs(Structure):
    _fields_ = (("db", u64 * 4), *_fields(u64, "dr6 dr7 flags"), ("reserved", u64 * 9))


class kvm_lapic_state(Structure):
    _fields_ = (("regs", u8 * 0x400),)


class kvm_msrs(Structure):  # followed by kvm_msr_entry entries[nmsrs]
    _fields_ = (("nmsrs", u32), ("pad", u32))


class kvm_msr_entry(Structure):
    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


class kvm_mp_state(Structure):
    _fields_ = (("mp_state", u32),)


class _events_exception(Structure):
    _fields_ = (*_fields(u8, "injected nr has_error_code pending"), ("error_code", u32))


class _events_interrupt(Structure):
    _fields_ = _fields(u8, "injected nr soft shadow")


class _events_nmi(Structure):
    _fields_ = _fields(u8, "injected pending masked pad")


class _events_smi(Structure):
    _fields_ = _fields(u8, "smm pending smm_inside_nmi latched_init")


class _events_triple_fault(Structure):
    _fields_ = (("pending", u8),)


class kvm_vcpu_events(Structure):
    _fields_ = (
        ("exception", _events_exception),
        ("interrupt", _events_interrupt),
        ("nmi", _events_nmi),
        *_fields(u32, "sipi_vector flags"),
        ("smi", _events_smi),
        ("triple_fault", _events_triple_fault),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    )


class kvm_translation(Structure):
    _fields_ = (
        *_fields(u64, "linear_address physical_address"),
        *_fields(u8, "valid writeable usermode"),
        ("pad", u8 * 5),
    )


class kvm_signal_mask(Structure):  # followed by u8 sigset[len]
    _fields_ = (("len", u32),)


# The run area: one page and more, shared with the kernel, at offset 0 of a vCPU's file descriptor


class _run_hw(Structure):
    _fields_ = (("hardware_exit_reason", u64),)


class _run_fail_entry(Structure):
    _fields_ = (("hardware_entry_failure_reason", u64), ("cpu", u32))


class _run_io(Structure):
    _fields_ = (("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64))


class kvm_debug_exit_arch(Structure):
    _fields_ = (*_fields(u32, "exception pad"), *_fields(u64, "pc dr6 dr7"))


class _run_debug(Structure):
    _fields_ = (("arch", kvm_debug_exit_arch),)


class _run_mmio(Structure):
    _fields_ = (("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8))


class _run_internal(Structure):
    _fields_ = (*_fields(u32, "suberror ndata"), ("data", u64 * 16))


class _run_system_event(Structure):
    _fields_ = (*_fields(u32, "type ndata"), ("data", u64 * 16))


class _run_exit(Union):
    _fields_ = (
        ("hw", _run_hw),
        ("fail_entry", _run_fail_entry),
        ("io", _run_io),
        ("debug", _run_debug),
        ("mmio", _run_mmio),
        ("internal", _run_internal),
        ("system_event", _run_system_event),
        ("padding", u8 * 256),
    )


class kvm_run(Structure):
    _anonymous_ = ("exit",)
    _fields_ = (
        *_fields(u8, "request_interrupt_window immediate_exit"),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        *_fields(u8, "ready_for_interrupt_injection if_flag"),
        ("flags", u16),
        *_fields(u64, "cr8 apic_base"),
        ("exit", _run_exit),
        *_fields(u64, "kvm_valid_regs kvm_dirty_regs"),
        ("s", u8 * 2048),
    )
