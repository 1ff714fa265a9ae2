"""Lab 1: a machine monitor by hand. Fill the gaps that say TODO; `kvmmig lab check .` tells how you do."""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter

from kvmmig.kvm import System

ADDRESS = 0x1000  # where the guest's code lies in its memory
SERIAL = 0x3F8


def run_guest(code: bytes, typed: bytes = b"") -> tuple[bytes, dict[str, int]]:
    """Run real-mode code until it halts. Returns what it wrote to the serial port, and its exits by kind."""
    memory = mmap.mmap(-1, 0x1000)
    memory[: len(code)] = code
    output = bytearray()
    exits: Counter[str] = Counter()
    with System.open() as system, system.create_vm() as vm:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # TODO 1: tell the VM of this memory, in slot 0, at the guest's ADDRESS: vm.set_user_memory_region.
        _ = address
        with vm.create_vcpu(0) as vcpu:
            # TODO 1: cs is zero, rip is ADDRESS, rflags is 2: get_sregs, set_sregs, get_regs, set_regs.
            # TODO 2: run it until it halts, and count what vcpu.run() returns, by its class's name.
            # TODO 3: serve the port SERIAL, in both directions.
            _ = vcpu
    return bytes(output), dict(exits)


HELLO = b"\xba\xf8\x03" + b"".join(bytes([0xB0, letter, 0xEE]) for letter in b"Hello") + b"\xf4"

if __name__ == "__main__":
    text, exits = run_guest(HELLO)
    print(text.decode(errors="replace"))
    print(exits)
