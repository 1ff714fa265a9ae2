"""A 16550A UART, the serial port COM1 of a PC. (National Semiconductor PC16550D, data sheet of 1995)

Bytes leave at once, whatever the divisor says, so the transmitter is always empty; bytes come in as fast as
the guest reads them, so the receiver never overruns outside loopback.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable

from kvmmig.errors import StateMismatch

PORT = 0x3F8
IRQ = 4
#: Bytes that wait on the host's side for a guest that doesn't read them yet.
INPUT_QUEUE = 4096
_FIFO_SIZE = 16
_TRIGGERS = (1, 4, 8, 14)

_IER_RX, _IER_THRE, _IER_LINE, _IER_MODEM = 0x01, 0x02, 0x04, 0x08
_IIR_NONE, _IIR_MODEM, _IIR_THRE, _IIR_RX, _IIR_LINE, _IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
_FCR_ENABLE, _FCR_CLEAR_RX = 0x01, 0x02
_LCR_DLAB = 0x80
_MCR_LOOPBACK = 0x10
_LSR_DATA, _LSR_OVERRUN, _LSR_EMPTY = 0x01, 0x02, 0x60
_MSR_DELTAS = 0x0F
_MSR_CONNECTED = 0xB0  # CTS, DSR and DCD: somebody is at the other end of the cable

_STATE = struct.Struct("<9B?HH")
#: The most bytes that `Serial.save` gives.
MOST_STATE = _STATE.size + _FIFO_SIZE + INPUT_QUEUE


class Serial:
    """COM1 with its two ends: the guest's at ports 0x3f8 to 0x3ff, and the host's (`feed` and ``output``).

    ``output`` gets what the guest sends, in a vCPU's thread, and must not block. ``irq`` gets the level of
    the interrupt line whenever it changes; it is not gated by OUT2. ``on_room`` is called, in a vCPU's
    thread, when the input queue has become empty after `feed` had to refuse bytes. All three are called with
    the UART's lock held. Thread-safe.
    """

    ports = range(PORT, PORT + 8)

    def __init__(
        self,
        output: Callable[[bytes], None],
        *,
        irq: Callable[[bool], None] = lambda level: None,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._output = output
        self._irq = irq
        self._on_room = on_room
        self._lock = threading.RLock()
        self._level = False
        self._refused = False
        self._queue: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._lsr_errors = 0
        self._msr_deltas = 0
        self._divisor = 12  # 9600 baud, where a PC's firmware leaves it
        self._thre_pending = False

    def feed(self, data: bytes) -> int:
        """Type at the guest. Says how many bytes were taken: fewer than all when the queue is full."""
        with self._lock:
            taken = data[: INPUT_QUEUE - len(self._queue)]
            self._queue.extend(taken)
            self._refused |= len(taken) < len(data)
            self._update()
            return len(taken)

    def read(self, port: int) -> int:
        """The byte that the guest reads from one of the eight registers."""
        with self._lock:
            value = self._read(port - PORT)
            self._update()
            return value

    def write(self, port: int, value: int) -> None:
        """The byte that the guest writes to one of the eight registers."""
        with self._lock:
            self._write(port - PORT, value)
            self._update()

    def save(self) -> bytes:
        """All registers and all bytes in flight."""
        with self._lock:
            head = _STATE.pack(
                self._ier,
                self._fcr,
                self._lcr,
                self._mcr,
                self._scr,
                self._lsr_errors,
                self._msr_deltas,
                self._divisor & 0xFF,
                self._divisor >> 8,
                self._thre_pending,
                len(self._fifo),
                len(self._queue),
            )
            return head + bytes(self._fifo) + bytes(self._queue)

    def load(self, data: bytes) -> None:
        """The reverse of `save`; sets the interrupt line too. `StateMismatch` leaves everything as it was."""
        if len(data) < _STATE.size:
            raise StateMismatch(
                f"the serial port's state has {len(data)} bytes and needs {_STATE.size} or more"
            )
        *registers, low, high, thre_pending, in_fifo, in_queue = _STATE.unpack_from(data)
        if len(data) != _STATE.size + in_fifo + in_queue:
            raise StateMismatch(
                f"the serial port's state has {len(data)} bytes, and by its own counts it should have "
                f"{_STATE.size + in_fifo + in_queue}"
            )
        if in_fifo > _FIFO_SIZE or in_queue > INPUT_QUEUE:
            raise StateMismatch(
                f"the serial port's state holds {in_fifo} and {in_queue} bytes in flight; "
                f"at most {_FIFO_SIZE} and {INPUT_QUEUE} are possible"
            )
        with self._lock:
            self._ier, self._fcr, self._lcr, self._mcr, self._scr, errors, deltas = registers
            self._ier &= 0x0F
            self._fcr &= 0xC1
            self._mcr &= 0x1F
            self._lsr_errors = errors & _LSR_OVERRUN
            self._msr_deltas = deltas & _MSR_DELTAS
            self._divisor = low | high << 8
            self._thre_pending = thre_pending
            self._fifo = deque(data[_STATE.size : _STATE.size + in_fifo])
            self._queue = deque(data[_STATE.size + in_fifo :])
            self._update()

    def _read(self, offset: int) -> int:
        if offset == 0:
            if self._lcr & _LCR_DLAB:
                return self._divisor & 0xFF
            return self._fifo.popleft() if self._fifo else 0
        if offset == 1:
            return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
        if offset == 2:
            return self._read_iir()
        if offset == 3:
            return self._lcr
        if offset == 4:
            return self._mcr
        if offset == 5:
            value = _LSR_EMPTY | self._lsr_errors | (_LSR_DATA if self._fifo else 0)
            self._lsr_errors = 0
            return value
        if offset == 6:
            value = self._modem_lines() | self._msr_deltas
            self._msr_deltas = 0
            return value
        return self._scr

    def _write(self, offset: int, value: int) -> None:
        if offset == 0:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == 1:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0x00FF | value << 8
            else:
                # Enabling the transmitter's interrupt while it is empty raises one at once.
                self._thre_pending |= bool(value & ~self._ier & _IER_THRE)
                self._ier = value & 0x0F
        elif offset == 2:
            if value & _FCR_CLEAR_RX or (value ^ self._fcr) & _FCR_ENABLE:
                self._fifo.clear()
            self._fcr = value & 0xC1 if value & _FCR_ENABLE else 0
        elif offset == 3:
            self._lcr = value
        elif offset == 4:
            before = self._modem_lines()
            self._mcr = value & 0x1F
            self._note_modem_change(before, self._modem_lines())
        elif offset == 7:
            self._scr = value

    def _transmit(self, value: int) -> None:
        if not self._mcr & _MCR_LOOPBACK:
            self._output(bytes((value,)))
        elif len(self._fifo) < self._fifo_room():
            self._fifo.append(value)
        else:
            self._lsr_errors |= _LSR_OVERRUN
        self._thre_pending = True

    def _fifo_room(self) -> int:
        return _FIFO_SIZE if self._fcr & _FCR_ENABLE else 1

    def _modem_lines(self) -> int:
        """The upper half of the MSR. In loopback: CTS is RTS, DSR is DTR, RI is OUT1 and DCD is OUT2."""
        if not self._mcr & _MCR_LOOPBACK:
            return _MSR_CONNECTED
        dtr, rts, outs = self._mcr & 1, self._mcr >> 1 & 1, self._mcr >> 2 & 3
        return rts << 4 | dtr << 5 | outs << 6

    def _note_modem_change(self, before: int, after: int) -> None:
        changed = before ^ after
        ring_ended = before & ~after & 0x40  # the ring indicator counts only when it goes away
        self._msr_deltas |= (changed & 0xB0 | ring_ended) >> 4

    def _pending(self) -> int:
        """The interrupt that the IIR names: the one of the highest priority that is enabled and pending."""
        if self._ier & _IER_LINE and self._lsr_errors:
            return _IIR_LINE
        if self._ier & _IER_RX and self._fifo:
            enough = not self._fcr & _FCR_ENABLE or len(self._fifo) >= _TRIGGERS[self._fcr >> 6]
            return _IIR_RX if enough else _IIR_TIMEOUT
        if self._ier & _IER_THRE and self._thre_pending:
            return _IIR_THRE
        if self._ier & _IER_MODEM and self._msr_deltas:
            return _IIR_MODEM
        return _IIR_NONE

    def _read_iir(self) -> int:
        pending = self._pending()
        if pending == _IIR_THRE:
            self._thre_pending = False
        return pending | (0xC0 if self._fcr & _FCR_ENABLE else 0)

    def _update(self) -> None:
        """Move waiting input on, and set the interrupt line to what the registers say now."""
        # Before the refill too: an emptied receiver must drop the line, or the next byte makes no edge.
        self._set_level()
        if not self._mcr & _MCR_LOOPBACK:  # in loopback the receiver is cut off from the cable
            while self._queue and len(self._fifo) < self._fifo_room():
                self._fifo.append(self._queue.popleft())
        self._set_level()
        if self._refused and not self._queue:
            self._refused = False
            self._on_room()

    def _set_level(self) -> None:
        level = self._pending() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)
