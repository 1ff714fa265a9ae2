"""A vCPU that can do nothing any more, told from its registers: halted for good, or going round for ever.

KVM keeps a halted vCPU inside KVM_RUN, so nobody hears of it: a machine looks a few times a second. It looks
at every vCPU, for each may wake the others; see `Board.look`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmmig.kvm import Vcpu
from kvmmig.kvm.abi import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    kvm_regs,
    kvm_sregs,
)
from kvmmig.machine import bios
from kvmmig.machine.crash import code_at, place
from kvmmig.machine.memory import GuestMemory

_PERIOD = 0.25  # seconds
_INTERRUPTS_ON = 1 << 9
_WAITING = (KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED)
# Loops that do nothing, and how far into each a vCPU may be found: jmp $; hlt and back; pause and back.
_LOOPS = (
    (b"\xeb\xfe", (0,)),
    (b"\xf4\xeb\xfd", (0, 1)),
    (b"\xf3\x90\xeb\xfc", (0, 2)),
    (b"\xe9\xfd\xff", (0,)),
)
_NEVER_STARTED = "it waits to be started by another vCPU"


class Looker:
    """Calls ``look`` again and again, from a thread of its own, until `end`."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kvmmig halts", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Blocks for a moment."""
        self._over.set()
        self._thread.join()

    def _main(self) -> None:
        while not self._over.wait(_PERIOD):
            self._look()


def why_stuck(vcpu: Vcpu, memory: GuestMemory, *, irqchip: bool) -> str | None:
    """Why this vCPU does nothing unless another one wakes it, or None; the text completes "vCPU 0: ...".

    For the vCPU's thread, out of the guest.
    """
    mp_state = vcpu.get_mp_state().mp_state if irqchip else 0
    if mp_state in _WAITING:
        return _NEVER_STARTED
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    where = place(regs, sregs)
    off = not regs.rflags & _INTERRUPTS_ON
    if mp_state == KVM_MP_STATE_HALTED and off:
        return f"it has halted before {where} with interrupts off, so nothing can wake it"
    if not _in_idle_loop(vcpu, regs, sregs, memory):
        return None
    if off or (sregs.cs.l and not sregs.idt.limit):
        return f"it goes round for ever at {where} with interrupts off"
    if not sregs.cr0 & 1 and bios.has_all_interrupts(memory):
        return f"it goes round for ever at {where}, and no interrupt leads out of there"
    return None


def _in_idle_loop(vcpu: Vcpu, regs: kvm_regs, sregs: kvm_sregs, memory: GuestMemory) -> bool:
    for loop, offsets in _LOOPS:
        for offset in offsets:
            code = code_at(vcpu, memory, regs.rip - offset, len(loop), sregs)
            if code == loop:
                return True
    return False
