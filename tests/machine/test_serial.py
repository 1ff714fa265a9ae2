"""The UART, register by register, as the data sheet of the PC16550D has it."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmmig.errors import StateMismatch
from kvmmig.machine.serial import INPUT_QUEUE, PORT, Serial

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(PORT, PORT + 8)
THR, FCR, DLL, DLM = RBR, IIR, RBR, IER


class Wired:
    """A UART whose interrupt line and output are looked at."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.output = bytearray()
        self.room = 0
        self.uart = Serial(self.output.extend, irq=self.levels.append, on_room=self.note_room)
        self.read, self.write = self.uart.read, self.uart.write

    def note_room(self) -> None:
        self.room += 1

    def line_is_high(self) -> bool:
        return bool(self.levels) and self.levels[-1]


@pytest.fixture
def wired() -> Wired:
    return Wired()


def test_after_reset_nothing_is_pending_and_the_transmitter_is_empty(wired: Wired) -> None:
    assert [wired.read(port) for port in (IER, IIR, LCR, MCR, LSR, SCR)] == [0, 1, 0, 0, 0x60, 0]


def test_what_is_written_to_thr_goes_out(wired: Wired) -> None:
    for value in b"hello":
        wired.write(THR, value)
    assert bytes(wired.output) == b"hello"


def test_dlab_turns_the_first_two_registers_into_the_divisor(wired: Wired) -> None:
    wired.write(LCR, 0x83)
    wired.write(DLL, 0x34)
    wired.write(DLM, 0x12)
    assert (wired.read(DLL), wired.read(DLM)) == (0x34, 0x12)
    wired.write(LCR, 0x03)
    assert (wired.read(RBR), wired.read(IER)) == (0, 0)
    assert not wired.output


def test_the_scratch_register_keeps_a_byte(wired: Wired) -> None:
    wired.write(SCR, 0xA5)
    assert wired.read(SCR) == 0xA5


def test_typed_bytes_are_read_in_order_and_lsr_says_when_there_is_one(wired: Wired) -> None:
    assert wired.uart.feed(b"ab") == 2
    assert wired.read(LSR) == 0x61
    assert (wired.read(RBR), wired.read(RBR)) == (ord("a"), ord("b"))
    assert wired.read(LSR) == 0x60
    assert wired.read(RBR) == 0


def test_feed_takes_what_there_is_room_for_and_tells_when_there_is_room_again(wired: Wired) -> None:
    data = bytes(range(256)) * (INPUT_QUEUE // 256 + 1)
    taken = wired.uart.feed(data)
    assert INPUT_QUEUE <= taken < len(data)
    assert wired.uart.feed(b"x") <= 1
    assert wired.room == 0
    got = bytes(wired.read(RBR) for _ in range(taken))
    assert got == data[:taken]
    assert wired.room == 1


def test_the_receive_interrupt_follows_the_receiver(wired: Wired) -> None:
    wired.uart.feed(b"a")
    assert not wired.line_is_high()
    wired.write(IER, 1)
    assert wired.line_is_high()
    assert wired.read(IIR) == 0x04
    wired.read(RBR)
    assert not wired.line_is_high()
    assert wired.read(IIR) == 0x01


def test_each_byte_of_an_unbuffered_receiver_makes_an_edge_of_its_own(wired: Wired) -> None:
    wired.write(IER, 1)
    wired.uart.feed(b"abc")
    for _ in range(3):
        wired.read(RBR)
    assert wired.levels == [True, False, True, False, True, False]


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_below_the_trigger_level_the_fifo_reports_a_timeout_instead(
    wired: Wired, fcr: int, trigger: int
) -> None:
    wired.write(FCR, fcr)
    wired.write(IER, 1)
    wired.uart.feed(bytes(trigger))
    assert wired.read(IIR) == 0xC4
    wired.read(RBR)
    assert wired.read(IIR) == (0xCC if trigger > 1 else 0xC1)


def test_the_transmitter_interrupt_comes_when_enabled_and_goes_when_iir_is_read(wired: Wired) -> None:
    wired.write(IER, 2)
    assert wired.line_is_high()
    assert wired.read(IIR) == 0x02
    assert not wired.line_is_high()
    wired.write(THR, 65)
    assert wired.line_is_high()
    wired.write(IER, 0)
    assert not wired.line_is_high()


def test_reading_iir_for_the_receiver_keeps_the_transmitters_interrupt(wired: Wired) -> None:
    wired.write(IER, 3)
    wired.uart.feed(b"a")
    assert wired.read(IIR) == 0x04
    wired.read(RBR)
    assert wired.read(IIR) == 0x02


def test_loopback_brings_bytes_back_and_keeps_them_off_the_cable(wired: Wired) -> None:
    wired.write(FCR, 0x01)
    wired.write(MCR, 0x10)
    wired.uart.feed(b"typed")
    wired.write(THR, 0x5A)
    assert wired.read(RBR) == 0x5A
    assert wired.read(LSR) == 0x60
    assert not wired.output
    wired.write(MCR, 0)
    assert bytes(wired.read(RBR) for _ in range(5)) == b"typed"


def test_loopback_turns_the_modem_outputs_into_inputs_and_notes_the_changes(wired: Wired) -> None:
    wired.write(MCR, 0x10)
    wired.read(MSR)
    wired.write(MCR, 0x1A)  # RTS and OUT2
    assert wired.read(MSR) == 0x90 | 0x09
    assert wired.read(MSR) == 0x90
    wired.write(MCR, 0x14)  # OUT1: the ring indicator, which counts when it goes
    assert wired.read(MSR) == 0x40 | 0x09
    wired.write(MCR, 0x10)
    assert wired.read(MSR) == 0x04


def test_a_modem_change_interrupts_until_msr_is_read(wired: Wired) -> None:
    wired.write(IER, 8)
    wired.write(MCR, 0x10)
    assert wired.read(IIR) == 0x00
    wired.read(MSR)
    assert wired.read(IIR) == 0x01


def test_a_full_receiver_in_loopback_overruns_and_says_so_once(wired: Wired) -> None:
    wired.write(MCR, 0x10)
    wired.write(IER, 4)
    wired.write(THR, 1)
    wired.write(THR, 2)
    assert wired.read(IIR) == 0x06
    assert wired.read(LSR) & 2
    assert not wired.read(LSR) & 2
    assert wired.read(RBR) == 1


def test_fcr_clears_the_receiver(wired: Wired) -> None:
    wired.write(FCR, 0x01)
    wired.write(MCR, 0x10)
    wired.write(THR, 1)
    wired.write(FCR, 0x03)
    assert wired.read(LSR) == 0x60


def test_restored_interrupts_raise_the_line(wired: Wired) -> None:
    wired.write(IER, 1)
    wired.uart.feed(b"a")
    other = Wired()
    other.uart.load(wired.uart.save())
    assert other.levels == [True]


class Life(RuleBasedStateMachine):
    """Whatever was done to a UART, its saved state makes one that answers the same from there on."""

    def __init__(self) -> None:
        super().__init__()
        self.wired = Wired()

    @rule(port=st.integers(RBR, SCR), value=st.integers(0, 255))
    def write(self, port: int, value: int) -> None:
        self.wired.write(port, value)

    @rule(port=st.integers(RBR, SCR))
    def read(self, port: int) -> None:
        assert 0 <= self.wired.read(port) <= 255

    @rule(data=st.binary(max_size=40))
    def feed(self, data: bytes) -> None:
        assert self.wired.uart.feed(data) == len(data)

    @rule(reads=st.lists(st.integers(RBR, SCR), max_size=30))
    def move(self, reads: list[int]) -> None:
        other = Wired()
        other.uart.load(self.wired.uart.save())
        assert other.line_is_high() == self.wired.line_is_high()
        assert [other.read(port) for port in reads] == [self.wired.read(port) for port in reads]
        assert other.uart.save() == self.wired.uart.save()
        self.wired = other

    @invariant()
    def the_line_says_whether_iir_has_something(self) -> None:
        other = Wired()
        other.uart.load(self.wired.uart.save())
        assert self.wired.line_is_high() == (not other.read(IIR) & 1)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30)


@given(st.binary(max_size=64))
def test_bytes_that_are_no_state_are_refused_and_change_nothing(data: bytes) -> None:
    uart = Serial(lambda output: None)
    uart.write(SCR, 0x77)
    before = uart.save()
    try:
        uart.load(data)
    except StateMismatch:
        assert uart.save() == before
    else:
        assert len(data) == len(uart.save())


def test_a_state_with_more_bytes_in_flight_than_fit_is_refused() -> None:
    state = struct.pack("<9B?HH", *[0] * 9, False, 17, 0) + bytes(17)
    with pytest.raises(StateMismatch, match="at most 16 and 4096 are possible"):
        Serial(lambda output: None).load(state)


def test_bytes_from_several_threads_are_all_there(wired: Wired) -> None:
    def send(value: int) -> None:
        for _ in range(1000):
            wired.write(THR, value)

    threads = [threading.Thread(target=send, args=(value,)) for value in (65, 66, 67)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wired.output) == [65] * 1000 + [66] * 1000 + [67] * 1000
