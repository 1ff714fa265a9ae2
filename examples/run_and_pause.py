"""Run a guest, pause it, look inside, and let it go on: a machine from Python.

The guest is a few bytes of 64-bit code. It counts up the quadword at 2 MiB, and prints a dot on the serial
port every time that it has counted another million.
"""

from __future__ import annotations

import math
import struct

import trio

from kvmmig.machine import Entry, Machine, MachineConfig, Program

COUNTER = 0x200000
CODE = bytes.fromhex(
    "bb 00 00 20 00"  # mov ebx, 0x200000
    "66 ba f8 03"  # mov dx, 0x3f8
    "b9 40 42 0f 00"  # more: mov ecx, 1000000
    "48 ff 03"  # again: inc qword ptr [rbx]
    "ff c9"  # dec ecx
    "75 f9"  # jnz again
    "b0 2e"  # mov al, '.'
    "ee"  # out dx, al
    "eb ef"  # jmp more
)


def counted(machine: Machine) -> int:
    """The guest's counter, read from its memory."""
    (value,) = struct.unpack("<Q", machine.memory.read(COUNTER, 8))
    return int(value)


async def main() -> None:
    # The guest's output comes in its vCPU's thread; a channel brings it to this task.
    send, dots = trio.open_memory_channel[bytes](math.inf)
    token = trio.lowlevel.current_trio_token()

    def output(data: bytes) -> None:
        token.run_sync_soon(send.send_nowait, data)

    config = MachineConfig(memory=4 << 20, name="counter")
    async with Machine.open(config, output=output) as machine:
        await machine.load(Program("counter", Entry.LONG64, CODE))
        await machine.start()
        for _ in range(3):
            print((await dots.receive()).decode(), end="", flush=True)

        await machine.pause()
        first = counted(machine)
        rip = machine.vcpus[0].get_regs().rip
        print(f" the guest {machine.state} at rip {rip:#x}; it has counted to {first}")
        await trio.sleep(0.05)
        print(f"50 ms later it has counted to {counted(machine)}")

        await machine.resume()
        for _ in range(3):
            print((await dots.receive()).decode(), end="", flush=True)
        print(f" the guest {machine.state} again, and counts on")

        await machine.end()
        ending = await machine.wait()
        print(f"the guest {machine.state}: {ending}")


if __name__ == "__main__":
    trio.run(main)
