"""Bytes -> JSON texts: where each message of a stream begins and ends. Sans I/O.

QMP has no frames: a client sends JSON objects one after the other, with or without anything between them,
on one line or on many, and several may come in one read. A scan for brackets and quotes finds their ends,
looks at every byte once however the stream is cut, and leaves the JSON itself to the decoder. Strings may
stand in single quotes, as QEMU allows: many a one-liner in a shell is written so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: The longest message, in bytes. One that makes sense has a few hundred; checking one of this length takes
#: up to 1 ms, and for so long nothing else runs.
MAX_MESSAGE = 64 << 10
#: The deepest nesting. QEMU takes 1024, but the decoder recurses on the stack that the interpreter allows.
MAX_NESTING = 256

_BLANK = re.compile(rb"[ \t\r\n]*")
_RESET = 0xFF  # no text has it, so a client sends it to end whatever the monitor is in the middle of
# Up to the next byte that counts. Strings that are whole and have no escapes are skipped.
_OUTSIDE = re.compile(
    rb"""(?:[^"'{}\[\]\xff]++|"[^"\\\xff\x00-\x1f]*+"|'[^'\\\xff\x00-\x1f]*+')*+["'{}\[\]\xff]"""
)
_INSIDE = {
    ord('"'): re.compile(rb'[^"\\\xff\x00-\x1f]*+["\\\xff\x00-\x1f]'),
    ord("'"): re.compile(rb"[^'\\\xff\x00-\x1f]*+['\\\xff\x00-\x1f]"),
}
_LINE_END = re.compile(rb"[\n\xff]")
_QUOTES = b"\"'"
_BACKSLASH = ord("\\")
_ESCAPABLE = b"\"'\\"
_OPENING = b"{["
_CLOSING = b"}]"
_VALUE = b"\"'-0123456789"  # a string or a number begins so


@dataclass(frozen=True)
class Malformed:
    """Bytes that are no message, and why; they were skipped, up to the end of their line.

    ``is_value``: it begins as JSON does, but as no object.
    """

    reason: str
    is_value: bool = False


class MessageSplitter:
    """Feed it what was read, and iterate over what that has completed.

    The iteration scans only as far as the next message, so that a caller can do something else in between;
    feed no more before it has ended. After something malformed it goes on with the next line, and after a
    byte 0xFF, which is never part of a text, with the next byte.
    """

    def __init__(self, max_message: int = MAX_MESSAGE, max_nesting: int = MAX_NESTING) -> None:
        self._max_message = max_message
        self._max_nesting = max_nesting
        self._data = bytearray()
        self._scanned = 0  # of _data
        self._depth = 0  # brackets that are open; 0 is between messages
        self._quote = 0  # that the string it is in began with; 0 outside of strings
        self._skipping = False  # until the end of the line

    def feed(self, data: bytes | bytearray) -> Iterator[bytes | Malformed]:
        self._data += data
        while (found := self._next()) is not None:
            yield found

    def _next(self) -> bytes | Malformed | None:
        if self._skipping and not self._skip_line():
            return None
        if self._depth == 0:
            blank = _BLANK.match(self._data)
            assert blank is not None
            del self._data[: blank.end()]
            if not self._data:
                return None
            if self._data[0] not in _OPENING:
                return self._not_a_message(self._data[0])
        return self._scan()

    def _scan(self) -> bytes | Malformed | None:
        """Go on from where the last one ended: from the start of a message, or within it."""
        data, at = self._data, self._scanned
        while match := (_INSIDE[self._quote] if self._quote else _OUTSIDE).match(data, at):
            at = match.end()
            byte = data[at - 1]
            if byte == _RESET:
                return self._malformed(at, "a message was cut short by a byte 0xFF", skip=False)
            if self._quote:
                if byte == self._quote:
                    self._quote = 0
                elif byte != _BACKSLASH:
                    return self._malformed(at - 1, "a string has a control character, or no end on its line")
                elif at == len(data):  # what it escapes has not come yet
                    at -= 1
                    break
                elif data[at] in _ESCAPABLE:  # anything else means what it would without
                    at += 1
            elif byte in _QUOTES:
                self._quote = byte
            elif byte in _OPENING:
                self._depth += 1
                if self._depth > self._max_nesting:
                    return self._malformed(at, f"it is nested more than {self._max_nesting} deep")
            else:
                self._depth -= 1
                if self._depth == 0:
                    if at > self._max_message:
                        break
                    return self._take(at)
        else:
            at = len(data)
        if at > self._max_message:
            return self._malformed(at, f"a message has more than {self._max_message} bytes")
        self._scanned = at
        return None

    def _take(self, end: int) -> bytes:
        message = bytes(memoryview(self._data)[:end])
        self._forget(end)
        return message

    def _not_a_message(self, byte: int) -> Malformed:
        if byte == _RESET:
            end = next((i for i, other in enumerate(self._data) if other != _RESET), len(self._data))
            return self._malformed(end, "a byte 0xFF came between two messages", skip=False)
        if byte in _CLOSING:
            return self._malformed(1, "expecting value")
        shown = chr(byte) if 0x20 < byte < 0x7F else f"\\x{byte:02x}"
        reason = f"stray '{shown}': a message is an object, and begins with '{{'"
        return self._malformed(1, reason, is_value=byte in _VALUE)

    def _malformed(self, end: int, reason: str, *, skip: bool = True, is_value: bool = False) -> Malformed:
        self._forget(end)
        self._skipping = skip
        return Malformed(reason, is_value)

    def _forget(self, end: int) -> None:
        del self._data[:end]
        self._scanned = self._depth = self._quote = 0

    def _skip_line(self) -> bool:
        """Whether the line's end has come."""
        match = _LINE_END.search(self._data)
        if match is None:
            self._data.clear()
            return False
        del self._data[: match.start() if self._data[match.start()] == _RESET else match.end()]
        self._skipping = False
        return True
