"""The port bus and the small devices on it."""

from __future__ import annotations

import pytest

from kvmmig.errors import StateMismatch
from kvmmig.machine.devices import DebugConsole, ExitPort, KeyboardReset, PortBus, SystemControlA


class Register:
    """Four ports that keep what was written."""

    ports = range(0x10, 0x14)

    def __init__(self) -> None:
        self.values = dict.fromkeys(self.ports, 0)
        self.log: list[tuple[int, int]] = []

    def read(self, port: int) -> int:
        return self.values[port]

    def write(self, port: int, value: int) -> None:
        self.values[port] = value
        self.log.append((port, value))


def test_an_unknown_port_reads_as_ones_and_ignores_writes() -> None:
    bus = PortBus(())
    assert bus.read(0x10, 4, 2) == b"\xff" * 8
    bus.write(0x10, 4, b"abcd")


def test_a_wide_access_is_one_of_bytes_at_rising_ports() -> None:
    register = Register()
    bus = PortBus((register,))
    bus.write(0x10, 4, b"abcd")
    assert register.log == [(0x10, 97), (0x11, 98), (0x12, 99), (0x13, 100)]
    assert bus.read(0x12, 4, 1) == b"cd\xff\xff"


def test_a_string_access_is_one_after_the_other_at_the_same_port() -> None:
    register = Register()
    bus = PortBus((register,))
    bus.write(0x10, 1, b"abc")
    assert register.log == [(0x10, 97), (0x10, 98), (0x10, 99)]
    bus.write(0x10, 2, b"wxyz")
    assert register.log[3:] == [(0x10, 119), (0x11, 120), (0x10, 121), (0x11, 122)]
    assert bus.read(0x10, 2, 2) == b"yzyz"


def test_the_debug_console_shows_what_is_written_and_can_be_told_by_reading() -> None:
    output = bytearray()
    console = DebugConsole(output.extend)
    console.write(0xE9, 65)
    assert (bytes(output), console.read(0xE9)) == (b"A", 0xE9)


def test_the_exit_port_hands_the_status_over() -> None:
    statuses: list[int] = []
    ExitPort(statuses.append).write(0xF4, 7)
    assert statuses == [7]


def test_port_92_keeps_a20_and_resets_on_bit_0_only() -> None:
    resets: list[None] = []
    control = SystemControlA(lambda: resets.append(None))
    control.write(0x92, 0xFE)
    assert (control.read(0x92), resets) == (0x02, [])
    control.write(0x92, 0x01)
    assert resets == [None]


def test_the_state_of_port_92_moves() -> None:
    control, other = SystemControlA(lambda: None), SystemControlA(lambda: None)
    control.write(0x92, 2)
    other.load(control.save())
    assert other.read(0x92) == 2
    with pytest.raises(StateMismatch):
        other.load(b"\x04")


def test_port_64_resets_on_command_fe_only_and_is_always_ready_for_one() -> None:
    resets: list[None] = []
    keyboard = KeyboardReset(lambda: resets.append(None))
    keyboard.write(0x64, 0xD1)
    assert (keyboard.read(0x64) & 2, resets) == (0, [])
    keyboard.write(0x64, 0xFE)
    assert resets == [None]
