"""The messages of QMP, checked as they come in and spelled as QEMU spells them as they go out.

A request is ``{"execute": NAME, "arguments": {...}, "id": ANYTHING}``; what is sent is a greeting, replies,
errors and events, each one JSON object on a line of its own, ended by CR LF, with a space behind each colon
and comma: scripts look for ``"running": true``. Sans I/O. See "QEMU Machine
Protocol Specification", docs/interop/qmp-spec.rst in QEMU's sources.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from kvmmig.errors import KvmmigError
from kvmmig.qmp.secret import CHALLENGE
from kvmmig.units import Range

#: The classes of errors that a client may tell apart. All but the first are for a client that can do
#: something else.
ERROR_CLASSES = ("GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap")

_END = b"\r\n"
_STRING = re.compile(rb"""'(?:[^'\\]++|\\.)*+'|"(?:[^"\\]++|\\.)*+\"""", re.DOTALL)
_SPECIAL = re.compile(rb'\\.|"', re.DOTALL)
_LONGEST_QUOTED = 4 << 10  # bytes: beyond it single quotes are none. To read so many takes up to 1 ms
_AS_JSON = {b"\\'": b"'", b'"': b'\\"'}
_AS_QEMU_SAYS = {  # the decoder's words, and those of qobject/json-parser.c
    "expected ':'": "missing : in object pair",
    "expected ',' or '}'": "expected separator in dict",
    "expected ',' or ']'": "expected separator in list",
    "trailing comma in object": "expecting value",
    "invalid escaped character": "invalid escape sequence in string",
}
_LONGEST_NAME = 80  # characters of a client's own words in an error


class QMPError(KvmmigError):
    """A command that failed: raised by handlers and, with the same words, by the client.

    ``desc`` is a sentence for a person, ``error_class`` one of QMP's: ``GenericError``, or
    ``CommandNotFound``, ``DeviceNotActive``, ``DeviceNotFound``, ``KVMMissingCap``.
    """

    def __init__(self, desc: str, *, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class NotQMP(QMPError):
    """What came is no JSON object: perhaps its sender speaks another protocol."""


class Arguments(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """The base of every command's arguments: ``max_bandwidth`` here is ``max-bandwidth`` there.

    ``ranges`` has those of its numbers that have one, by the name that they have here; ``complaints`` what is
    said of one outside of its range, where that is not what its `Range` says.
    """

    ranges: ClassVar[Mapping[str, Range]] = {}
    complaints: ClassVar[Mapping[str, str]] = {}


class NoArguments(Arguments, frozen=True):
    """What a command without arguments is given."""


class Version(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class VersionInfo(msgspec.Struct, frozen=True):
    """``query-version``'s reply, which is part of the greeting too."""

    qemu: Version
    package: str


def version_info(version: str) -> VersionInfo:
    """Of ``"kvmmig 0.4.1.dev2"``: 0, 4, 1 and all of it.

    The field for the numbers is called "qemu" because clients look there.
    """
    numbers = [int(number) for number in re.findall(r"[0-9]+", version.rpartition(" ")[2])[:3]]
    return VersionInfo(Version(*[*numbers, 0, 0, 0][:3]), version)


class Request(msgspec.Struct, frozen=True):
    """One command. ``arguments`` is JSON text: only the command knows what it must look like."""

    execute: str
    arguments: msgspec.Raw
    #: It said ``exec-oob``: the client wants it carried out before those that wait.
    out_of_band: bool = False


class Proof(Arguments, frozen=True):
    """The arguments of `PROVE`: hexadecimal digits."""

    nonce: str
    proof: str


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)
_proof = msgspec.json.Decoder(Proof)
_encoder = msgspec.json.Encoder()
_NO_ARGUMENTS = msgspec.Raw(b"{}")


def parse_members(text: bytes | bytearray) -> dict[str, msgspec.Raw]:
    """The members of one request. Raises `QMPError`."""
    if b"'" in text and len(text) <= _LONGEST_QUOTED:
        text = _STRING.sub(_double_quoted, text)
    try:
        text.decode()  # the decoder looks only at strings that it unpacks
        members = _members.decode(text)
        json.loads(text, object_pairs_hook=_no_duplicates, parse_int=str, parse_float=str)
        return members
    except msgspec.ValidationError as error:
        raise NotQMP("QMP input must be a JSON object") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise parse_error(error) from error


def _double_quoted(string: re.Match[bytes]) -> bytes:
    """A string as JSON has it, of one as QEMU takes it."""
    if string[0].startswith(b'"') and b"\\'" not in string[0]:
        return string[0]
    return b'"%b"' % _SPECIAL.sub(lambda found: _AS_JSON.get(found[0], found[0]), string[0][1:-1])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Of two values for one name, no two programs mean the same."""
    if len(dict(pairs)) < len(pairs):
        raise QMPError("JSON parse error, duplicate key")


def parse_id(members: Mapping[str, msgspec.Raw]) -> msgspec.Raw | None:
    """What is to be sent back with the reply, as it was written but on one line."""
    text = members.get("id")
    return None if text is None else msgspec.Raw(bytes(text).translate(None, b"\r\n"))


def parse_request(members: Mapping[str, msgspec.Raw], *, out_of_band: bool = False) -> Request:
    """What is to be done. ``out_of_band``: the client may ask for that. Raises `QMPError`."""
    execute: str | None = None
    arguments = _NO_ARGUMENTS
    for name, text in members.items():
        if name == "execute" or (name == "exec-oob" and out_of_band):
            if execute is not None:
                raise QMPError("QMP input member 'exec-oob' clashes with 'execute'")
            execute = _parse_command(name, text)
        elif name == "arguments":
            if not bytes(text).startswith(b"{"):
                raise QMPError("QMP input member 'arguments' must be an object")
            arguments = text
        elif name != "id":
            raise QMPError(f"QMP input member '{shortened(name)}' is unexpected")
    if execute is None:
        raise QMPError("QMP input lacks member 'execute'")
    return Request(execute, arguments, out_of_band="exec-oob" in members)


def parse_proof(request: Request) -> Proof:
    """Raises `QMPError`."""
    try:
        return _proof.decode(request.arguments)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise QMPError(f"'{request.execute}' needs 'nonce' and 'proof', both hexadecimal digits") from error


def _parse_command(name: str, text: msgspec.Raw) -> str:
    try:
        return _string.decode(text)
    except msgspec.ValidationError as error:
        raise QMPError(f"QMP input member '{name}' must be a string") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise parse_error(error) from error


def parse_error(error: Exception) -> NotQMP:
    """What is wrong with a text that is not JSON."""
    match error:
        case UnicodeDecodeError():
            reason = "a string is not UTF-8"
        case RecursionError():
            reason = "it is nested too deeply"
        case _:
            reason = str(error).removeprefix("JSON is malformed: ")
    reason = f"{reason[:1].lower()}{reason[1:]}"
    for ours, qemus in _AS_QEMU_SAYS.items():
        if reason.startswith(ours):
            reason = qemus + reason.removeprefix(ours)
    return NotQMP(f"JSON parse error, {reason}")


def not_a_message(reason: str, *, is_value: bool) -> NotQMP:
    """What is wrong with bytes that are no message; ``is_value``: they are JSON perhaps, but no object."""
    return NotQMP("QMP input must be a JSON object" if is_value else f"JSON parse error, {reason}")


def shortened(text: str) -> str:
    """A client's own word, for an error that quotes it."""
    return text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "..."


def encode_greeting(version: str) -> bytes:
    return _line({"QMP": {"version": version_info(version), "capabilities": []}})


def encode_challenge(nonce: str) -> bytes:
    """What comes before the greeting, where a secret is asked for."""
    return _line({CHALLENGE: {"nonce": nonce}})


def encode_reply(result: object, request_id: msgspec.Raw | None = None) -> bytes:
    """Raises `TypeError` for a result that is no JSON."""
    return _line({"return": {} if result is None else result}, request_id)


def encode_error(
    desc: str, error_class: str = "GenericError", request_id: msgspec.Raw | None = None
) -> bytes:
    return _line({"error": {"class": error_class, "desc": desc}}, request_id)


def encode_event(event: str, data: Mapping[str, object] | None = None) -> bytes:
    """An event of this moment; one without data has no member for it, as QEMU's."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    message: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": microseconds},
        "event": event,
    }
    if data:
        message["data"] = data
    return _line(message)


def _line(message: dict[str, Any], request_id: msgspec.Raw | None = None) -> bytes:
    if request_id is not None:
        message["id"] = request_id
    return msgspec.json.format(_encoder.encode(message), indent=0) + _END
