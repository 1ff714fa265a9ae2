"""What takes bytes of a stranger's, each as a function that may only end, or raise what its docs promise.

Besides, what was understood must mean one thing: a URI that was read is written and read again as itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from kvmmig import units
from kvmmig.errors import BadURI, KvmmigError, StateMismatch, StreamError
from kvmmig.machine.config import MachineDescription
from kvmmig.machine.devices import SystemControlA
from kvmmig.machine.serial import Serial
from kvmmig.qmp.address import parse_address
from kvmmig.qmp.framing import Malformed, MessageSplitter
from kvmmig.qmp.messages import QMPError, parse_id, parse_members, parse_request
from kvmmig.stream import Decoder, Direction, Kind, Pages
from kvmmig.stream.format import HEADER, IDENTITY_SIZE, MAGIC, PREAMBLE, VERSION, Checks
from kvmmig.transport import TransportURI

#: Stands in a body for the digest over all frames before it, which no fuzzer guesses.
DIGEST = b"%DIGEST%"
#: More would test numpy's zeros.
_MOST_PAGES = 1024


def raw_stream(data: bytes) -> None:
    """A destination, and a source that hears its peer, read it."""
    for direction in Direction:
        with suppress(StreamError):
            _decode(data, direction)


def sealed_frames(data: bytes) -> None:
    """Frames whose checks are right, and whose kinds, numbers and bodies are ``data``'s.

    Each is a byte for its kind, one for its runs, one for its lane and length, two for how much of the rest
    is its body.
    """
    for direction in Direction:
        preamble = PREAMBLE.pack(MAGIC, VERSION, direction) + bytes(IDENTITY_SIZE)
        checks, parts, sequence, rest = Checks(preamble), [preamble], 0, data
        while len(rest) > 5:
            kind, runs, odd = rest[0] % (len(Kind) + 2), rest[1], rest[2]
            size = min(int.from_bytes(rest[3:5], "little"), len(rest) - 5)
            body, rest = rest[5 : 5 + size], rest[5 + size :]
            body = body.replace(DIGEST, checks.digest.encode())
            length = len(body) if odd < 250 else len(body) + odd
            blank = HEADER.pack(kind, 0, odd == 249, runs, sequence, length, 0)
            check = checks.of(blank, body)
            checks.note(check)
            parts += [HEADER.pack(kind, 0, odd == 249, runs, sequence, length, check), body]
            sequence += 1
        with suppress(StreamError):
            _decode(b"".join(parts), direction)


def _decode(data: bytes, direction: Direction) -> None:
    decoder = Decoder(direction)
    decoder.limit_sections(4, 4096, 8192)
    rest = memoryview(data)
    while not decoder.finished:
        room = decoder.buffer()
        size = min(len(room), len(rest))
        if not size:
            decoder.end_of_stream()
        room[:size], rest = rest[:size], rest[size:]
        event = decoder.advance(size)
        if isinstance(event, Pages):
            if event.n_pages > _MOST_PAGES:
                return
            decoder.place([memoryview(bytearray(event.n_pages * 4096))])


def messages(data: bytes) -> None:
    """A monitor's client sent it, in two pieces."""
    splitter = MessageSplitter()
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        for message in splitter.feed(piece):
            if not isinstance(message, Malformed):
                with suppress(QMPError):
                    members = parse_members(message)
                    parse_id(members)
                    parse_request(members)


def uri(data: bytes) -> None:
    with suppress(BadURI):
        read = TransportURI.parse(_text(data))
        assert TransportURI.parse(str(read)) == read


def address(data: bytes) -> None:
    with suppress(KvmmigError):
        parse_address(_text(data))


def numbers(data: bytes) -> None:
    text = _text(data)
    for parse in (units.parse_size, units.parse_rate, units.parse_duration, units.parse_percent):
        with suppress(ValueError):
            parse(text)


def description(data: bytes) -> None:
    """What a hello says of the machine."""
    with suppress(StateMismatch):
        MachineDescription.decode(data).config()


def devices(data: bytes) -> None:
    """The state sections that are ours, not the kernel's. What was taken is written as it was read."""
    serial = Serial(lambda output: None)
    with suppress(StateMismatch):
        serial.load(data)
        again = Serial(lambda output: None)
        again.load(serial.save())
        assert again.save() == serial.save()
    with suppress(StateMismatch):
        SystemControlA(lambda: None).load(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (raw_stream, sealed_frames, messages, uri, address, numbers, description, devices)
}
