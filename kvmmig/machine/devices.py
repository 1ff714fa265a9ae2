"""Port devices: the bus, the debug console, the exit port, A20 and the two ways to reset a PC.

A guest's port access is served in its vCPU's thread, so a device call never blocks, and a device that has
state guards it with a lock: other vCPUs and the host come from other threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from kvmmig.errors import StateMismatch
from kvmmig.machine.serial import Serial

#: The devices of every machine and the version of each one's state. A stream's hello carries this.
DEVICE_VERSIONS: dict[str, int] = {
    "serial": 1,
    "debug-console": 1,
    "exit": 1,
    "system-control": 1,
    "keyboard-reset": 1,
    "bios": 1,
}


class Device(Protocol):
    """Something with byte-wide I/O ports."""

    @property
    def ports(self) -> Iterable[int]:
        """The ports that it answers."""

    def read(self, port: int) -> int:
        """The byte that a guest reads. Never blocks."""

    def write(self, port: int, value: int) -> None:
        """Take the byte that a guest writes. Never blocks."""


class PortBus:
    """Who answers which port. A port that nobody answers reads as all ones; writes to it are lost."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self._devices = {port: device for device in devices for port in device.ports}

    def read(self, port: int, size: int, count: int) -> bytes:
        """``count`` items of ``size`` bytes. A wide access is one of bytes, as on the ISA bus."""
        data = bytearray()
        for index in range(size * count):
            device = self._devices.get(port + index % size)
            data.append(0xFF if device is None else device.read(port + index % size))
        return bytes(data)

    def write(self, port: int, size: int, data: bytes) -> None:
        """Items of ``size`` bytes, one after the other in ``data``."""
        for index, value in enumerate(data):
            device = self._devices.get(port + index % size)
            if device is not None:
                device.write(port + index % size, value)


class DebugConsole:
    """Port 0xe9 of Bochs: what is written there is shown. Reads as 0xe9, by which a guest can tell."""

    ports = (0xE9,)

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def read(self, port: int) -> int:
        return 0xE9

    def write(self, port: int, value: int) -> None:
        self._output(bytes((value,)))


class ExitPort:
    """Port 0xf4: the byte written there is the guest's exit status, and its end."""

    ports = (0xF4,)

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, port: int) -> int:
        return 0xFF

    def write(self, port: int, value: int) -> None:
        self._on_exit(value)


class SystemControlA:
    """Port 0x92 of the PS/2: bit 1 is A20 (kept, but line 20 is never masked), bit 0 resets the machine."""

    ports = (0x92,)

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0  # one byte, written in one go: no lock

    def read(self, port: int) -> int:
        return self._value

    def write(self, port: int, value: int) -> None:
        self._value = value & 0x02
        if value & 0x01:
            self._on_reset()

    def save(self) -> bytes:
        return bytes((self._value,))

    def load(self, data: bytes) -> None:
        if len(data) != 1 or data[0] & ~0x02:
            raise StateMismatch("the state of port 0x92 must be one byte with no other bit than A20's")
        self._value = data[0]


class KeyboardReset:
    """Port 0x64, as much of a keyboard controller as resets a PC: command 0xfe. It never has input."""

    ports = (0x64,)

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, port: int) -> int:
        return 0x00

    def write(self, port: int, value: int) -> None:
        if value == 0xFE:
            self._on_reset()


__all__ = [
    "DEVICE_VERSIONS",
    "DebugConsole",
    "Device",
    "ExitPort",
    "KeyboardReset",
    "PortBus",
    "Serial",
    "SystemControlA",
]
