"""Dirty trackers: which pages has the guest written since we last asked?

A tracker is chosen by name, so that there can be others (the dirty ring, write protection by userfaultfd).
Its calls are ioctls over the whole guest and may take milliseconds: they belong in a thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from kvmmig.kvm import Vm
from kvmmig.kvm.abi import KVM_MEM_LOG_DIRTY_PAGES
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import PageSet

#: Pages that one KVM_CLEAR_DIRTY_LOG may cover (64 MiB). It holds the lock that the guest's page faults need,
#: and a CPU that the kernel may give to nobody else meanwhile: 3 ms for a GiB, 0.2 ms for this.
_CLEAR_PAGES = 1 << 14


class DirtyTracker(ABC):
    """Finds the pages that were written, by the guest or by the host's devices. Not thread-safe."""

    @abstractmethod
    def start(self) -> None:
        """Begin. From here on, `collect` finds every page that is written; the first one finds all pages.

        Raises `WrongState` where another tracker of the same guest has begun: a dirty log is one's own.
        """

    @abstractmethod
    def collect(self, into: PageSet) -> int:
        """Add the pages written since the last call to ``into``, forget them here, and say how many.

        What was collected is pending: nobody else remembers it.
        """

    @abstractmethod
    def stop(self) -> None:
        """End; the guest runs at full speed again. Idempotent, allowed in any state."""


class BitmapTracker(DirtyTracker):
    """KVM's dirty bitmap with manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, initially all set).

    "Initially set" makes starting cheap: nothing is write-protected until it is cleared, and the first
    `collect` gets all pages by the same path as every later one (kernel: virt/kvm/api.rst, 4.8 and 4.117).
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._bitmap = PageSet(memory.n_pages)
        self._on = False

    def start(self) -> None:
        self._memory.track_host_writes(True)  # first: it refuses a second tracker
        self._on = True
        self._vm.enable_manual_dirty_log_protect(initially_set=True)
        self._set_flags(KVM_MEM_LOG_DIRTY_PAGES)

    def collect(self, into: PageSet) -> int:
        self._bitmap.clear()
        for region in self._memory.regions:
            n_pages = region.size // PAGE_SIZE
            first_word = region.first_page // 64
            words = self._bitmap.words[first_word : first_word + n_pages // 64]
            self._vm.get_dirty_log(region.slot, words.data)
            for first in range(0, n_pages, _CLEAR_PAGES):
                count = min(_CLEAR_PAGES, n_pages - first)
                part = words[first // 64 : (first + count) // 64]
                if np.any(part):
                    self._vm.clear_dirty_log(region.slot, first, count, part.data)
        self._memory.take_host_writes(self._bitmap)
        into.update(self._bitmap)
        return len(self._bitmap)

    def stop(self) -> None:
        if self._on:
            self._set_flags(0)
            self._memory.track_host_writes(False)
            self._on = False

    def _set_flags(self, flags: int) -> None:
        for region in self._memory.regions:
            self._vm.set_user_memory_region(
                region.slot, region.gpa, region.size, self._memory.address(region), flags
            )
