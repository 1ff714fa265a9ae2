"""The commands of a server: a name, what its arguments must look like, and who carries it out.

>>> table = CommandTable()
>>> class MigrateArguments(Arguments, frozen=True):
...     uri: str
>>> @table.command("migrate", MigrateArguments)
... async def migrate(session: Session, arguments: MigrateArguments) -> None: ...
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import msgspec
from msgspec import UNSET

from kvmmig.qmp.messages import Arguments, NoArguments, QMPError, parse_error, shortened
from kvmmig.qmp.session import Session
from kvmmig.units import Range

ArgsT = TypeVar("ArgsT", bound=msgspec.Struct)

#: Carries a command out. What it returns is the reply: a `msgspec.Struct`, a dict, a list, or None for
#: ``{}``. Any `KvmmigError` that it raises is the reply too.
Handler = Callable[[Session, ArgsT], Awaitable[object]]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Awaitable[object]])


@dataclass(frozen=True)
class _Command:
    arguments: msgspec.json.Decoder[Any]
    ranges: Mapping[str, Range]
    complaints: Mapping[str, str]
    handler: Handler[Any]
    before_negotiation: bool


class CommandTable:
    """Commands by name. It knows no sockets: `QMPServer` serves it, and a test may call `execute`."""

    def __init__(self) -> None:
        self._commands: dict[str, _Command] = {}

    @overload
    def add(
        self, name: str, arguments: None, handler: Handler[NoArguments], *, before_negotiation: bool = False
    ) -> None: ...

    @overload
    def add(
        self, name: str, arguments: type[ArgsT], handler: Handler[ArgsT], *, before_negotiation: bool = False
    ) -> None: ...

    def add(
        self,
        name: str,
        arguments: type[msgspec.Struct] | None,
        handler: Handler[Any],
        *,
        before_negotiation: bool = False,
    ) -> None:
        """Add a command. ``arguments`` is a subclass of `Arguments`, or None for a command that has none.

        The handler gets the session and the checked arguments (a `NoArguments` for None). It runs in the
        client's own task, so it may take its time, but not the event loop's. Raises `ValueError` for a name
        that is taken.
        """
        schema = NoArguments if arguments is None else arguments
        if not schema.__struct_config__.forbid_unknown_fields:
            raise TypeError(f"{schema.__name__} would take unknown arguments; derive it from Arguments")
        if name in self._commands:
            raise ValueError(f"there is a command {name!r} already")
        known = schema if issubclass(schema, Arguments) else Arguments
        decoder = msgspec.json.Decoder(schema)
        self._commands[name] = _Command(decoder, known.ranges, known.complaints, handler, before_negotiation)

    def command(
        self, name: str, arguments: type[msgspec.Struct] | None = None
    ) -> Callable[[HandlerT], HandlerT]:
        """`add` as a decorator."""

        def decorate(handler: HandlerT) -> HandlerT:
            self.add(name, arguments or NoArguments, handler)
            return handler

        return decorate

    def names(self) -> list[str]:
        return sorted(self._commands)

    def arguments(self, name: str) -> type[msgspec.Struct]:
        """What that command takes."""
        schema: type[msgspec.Struct] = self._commands[name].arguments.type
        return schema

    def replies(self, name: str) -> bool:
        """Whether its reply may have anything in it: a handler that is annotated to return None says no."""
        annotations = getattr(self._commands[name].handler, "__annotations__", {})
        return annotations.get("return", object) not in (None, "None")

    def __contains__(self, name: str) -> bool:
        return name in self._commands

    def check_out_of_band(self, name: str) -> None:
        """Raise `QMPError`: each command's turn comes when those before it are done."""
        if name not in self._commands:
            raise _not_found(name)
        raise QMPError(f"The command {name} does not support OOB")

    async def execute(self, session: Session, name: str, arguments: msgspec.Raw | bytes = b"{}") -> object:
        """Carry out one command whose arguments are a JSON object's text.

        Raises `QMPError` for a command that is unknown, comes too early or has wrong arguments, and
        whatever its handler raises.
        """
        command = self._commands.get(name)
        if not session.negotiated and (command is None or not command.before_negotiation):
            raise QMPError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", error_class="CommandNotFound"
            )
        if command is None:
            raise _not_found(name)
        try:
            checked = command.arguments.decode(arguments)
        except msgspec.ValidationError as error:
            raise QMPError(_sentence(str(error), command.arguments.type, command.ranges)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise parse_error(error) from error
        for parameter, within in command.ranges.items():
            value = getattr(checked, parameter)
            if value not in (None, UNSET) and value not in within:
                raise QMPError(command.complaints.get(parameter) or _expects(_spelled(parameter), within))
        return await command.handler(session, checked)


def _not_found(name: str) -> QMPError:
    return QMPError(f"The command {shortened(name)} has not been found", error_class="CommandNotFound")


# msgspec's words -> QEMU's, in qapi/qobject-input-visitor.c. The path is "$.a[0].b" or missing.
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<type>[^`]*)`, got `[^`]*`")
_VALUE = re.compile(r"Invalid enum value (?P<value>.*)", re.DOTALL)
_OUT_OF_RANGE = re.compile(r"(?:Integer value|Number) out of range")
_AT = re.compile(r" - at `(?:key in )?\$(?P<path>[^`]*)`$")
_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _sentence(message: str, schema: type[msgspec.Struct], ranges: Mapping[str, Range]) -> str:
    """What is wrong with an argument, in QEMU's words; for a name that is not known, those that are."""
    at = _AT.search(message)
    path = "" if at is None else at["path"].removeprefix(".")
    what = message if at is None else message[: at.start()]
    if match := _MISSING.fullmatch(what):
        return f"Parameter '{_joined(path, match['name'])}' is missing"
    if match := _UNKNOWN.fullmatch(what):
        known = schema.__struct_encode_fields__
        there = "" if path else f"; there are {', '.join(known)}" if known else "; there are none"
        return f"Parameter '{_joined(path, shortened(match['name']))}' is unexpected{there}"
    if match := _VALUE.fullmatch(what):
        return f"Parameter '{path.rpartition('.')[2]}' does not accept value {shortened(match['value'])}"
    within = {_spelled(name): within for name, within in ranges.items()}
    if path in within:  # a number that has a range is of an unsigned type
        return f"Parameter '{path}' expects uint64"
    if match := _TYPE.fullmatch(what):
        kinds = [_TYPES.get(kind, kind) for kind in match["type"].split(" | ") if kind != "null"]
        return f"Invalid parameter type for '{path}', expected: {' or '.join(kinds)}"
    if _OUT_OF_RANGE.fullmatch(what):  # so far out that it can't even be read
        return f"Parameter '{path}' is out of range"
    return f"Parameter '{path}' expects {what.removeprefix('Expected ').replace('`', '')}"


def _expects(name: str, within: Range) -> str:
    return f"Parameter '{name}' expects {within.in_words}"


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
