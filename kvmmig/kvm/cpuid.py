"""CPUID tables, as KVM gives and takes them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from ctypes import Array, Structure
from typing import Any, NamedTuple, TypeVar

from kvmmig.errors import KvmError
from kvmmig.kvm import abi
from kvmmig.kvm.ioctl import ioctl

Header = TypeVar("Header", bound=Structure)

# A guess that fits today's hosts at the first try; more entries cost another call, not an error.
_FIRST_GUESS = 128
_MOST = 1 << 16


class CpuidEntry(NamedTuple):
    """What the ``cpuid`` instruction answers for one function and index (struct kvm_cpuid_entry2).

    ``index`` counts only where ``flags`` has ``KVM_CPUID_FLAG_SIGNIFCANT_INDEX``. Change one by
    ``entry._replace(ebx=...)``.
    """

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def growing(fd: int, request: int, header: type[Header], entry: type[Any]) -> tuple[Header, Array[Any]]:
    """Read a list whose length is known only to the kernel: twice the room after each E2BIG."""
    room = _FIRST_GUESS
    counter = header._fields_[0][0]
    while True:
        head, entries = abi.flexible(header, entry, room)
        setattr(head, counter, room)
        try:
            ioctl(fd, request, head)
        except KvmError as error:
            if error.errno != errno.E2BIG or room >= _MOST:
                raise
            room *= 2
        else:
            return head, entries


def read_cpuid(fd: int, request: int) -> list[CpuidEntry]:
    """The table that ``request`` (KVM_GET_SUPPORTED_CPUID or KVM_GET_CPUID2) answers."""
    head, entries = growing(fd, request, abi.kvm_cpuid2, abi.kvm_cpuid_entry2)
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries[: head.nent]
    ]


def pack_cpuid(table: Iterable[CpuidEntry]) -> abi.kvm_cpuid2:
    """The table as KVM_SET_CPUID2 wants it."""
    table = list(table)
    head, entries = abi.flexible(abi.kvm_cpuid2, abi.kvm_cpuid_entry2, len(table))
    head.nent = len(table)
    entries[:] = [abi.kvm_cpuid_entry2(*entry) for entry in table]
    return head
