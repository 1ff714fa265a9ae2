"""Two numbers added by a guest of seven instructions, on the bindings alone.

It is 16-bit real-mode code, which every x86 CPU starts with. Usage: python examples/two_numbers.py [A B]
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from kvmmig.errors import KvmError
from kvmmig.kvm import Hlt, IoOut, System

CODE = bytes([
    0xBA, 0xF8, 0x03,  # mov dx, 0x3f8
    0x00, 0xD8,        # add al, bl
    0x04, 0x30,        # add al, '0'
    0xEE,              # out dx, al
    0xB0, 0x0A,        # mov al, '\n'
    0xEE,              # out dx, al
    0xF4,              # hlt
])  # fmt: skip
ADDRESS = 0x1000


def main(a: int, b: int) -> None:
    memory = mmap.mmap(-1, 0x1000)
    memory[: len(CODE)] = CODE
    with System.open() as system, system.create_vm() as vm:
        vm.set_user_memory_region(
            0, ADDRESS, len(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory))
        )
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rax, regs.rbx, regs.rflags = ADDRESS, a, b, 2
            vcpu.set_regs(regs)
            print(f"{a} + {b} = ", end="")
            while True:
                match vcpu.run():
                    case IoOut(0x3F8, data=data):
                        print(data.decode("ascii"), end="")
                    case Hlt():
                        return
                    case other:
                        raise SystemExit(f"the guest did something unexpected: {other}")


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:] or "22" if text.isdecimal()]
    if len(numbers) != 2 or sum(numbers) > 9:
        raise SystemExit("the guest prints one digit: give two numbers whose sum is at most 9")
    try:
        main(*numbers)
    except KvmError as error:
        raise SystemExit(str(error)) from None
