"""Lab 1, one solution."""

from __future__ import annotations

import ctypes
import mmap
from collections import Counter

from kvmmig.kvm import Hlt, IoIn, IoOut, System

ADDRESS = 0x1000
SERIAL = 0x3F8


def run_guest(code: bytes, typed: bytes = b"") -> tuple[bytes, dict[str, int]]:
    """Run real-mode code until it halts. Returns what it wrote to the serial port, and its exits by kind."""
    memory = mmap.mmap(-1, 0x1000)
    memory[: len(code)] = code
    output, keys = bytearray(), iter(typed)
    exits: Counter[str] = Counter()
    with System.open() as system, system.create_vm() as vm:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, ADDRESS, len(memory), address)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags = ADDRESS, 2
            vcpu.set_regs(regs)
            while True:
                why = vcpu.run()
                exits[type(why).__name__] += 1
                match why:
                    case IoOut(port, _, data):
                        if port == SERIAL:
                            output += data
                    case IoIn(port, size, count):
                        answer = bytes(next(keys, 0) if port == SERIAL else 0xFF for _ in range(size * count))
                        vcpu.complete_in(answer)
                    case Hlt():
                        return bytes(output), dict(exits)
                    case other:
                        raise RuntimeError(f"the guest did something unexpected: {other}")


HELLO = b"\xba\xf8\x03" + b"".join(bytes([0xB0, letter, 0xEE]) for letter in b"Hello") + b"\xf4"

if __name__ == "__main__":
    text, exits = run_guest(HELLO)
    print(text.decode(errors="replace"))
    print(exits)
