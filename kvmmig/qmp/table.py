"""The commands of a server: a name, what its arguments must look like, and who carries it out.

>>> table = CommandTable()
>>> class MigrateArguments(Arguments, frozen=True):
...     uri: str
>>> @table.command("migrate", MigrateArguments)
... async def migrate(session: Session, arguments: MigrateArguments) -> None: ...
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import msgspec

from kvmmig.qmp.messages import NoArguments, QMPError, parse_error, shortened
from kvmmig.qmp.session import Session

ArgsT = TypeVar("ArgsT", bound=msgspec.Struct)

#: Carries a command out. What it returns is the reply: a `msgspec.Struct`, a dict, a list, or None for
#: ``{}``. Any `KvmmigError` that it raises is the reply too.
Handler = Callable[[Session, ArgsT], Awaitable[object]]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Awaitable[object]])


@dataclass(frozen=True)
class _Command:
    arguments: msgspec.json.Decoder[Any]
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
        self._commands[name] = _Command(msgspec.json.Decoder(schema), handler, before_negotiation)

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

    def __contains__(self, name: str) -> bool:
        return name in self._commands

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
            raise QMPError(f"The command {shortened(name)} has not been found", error_class="CommandNotFound")
        try:
            checked = command.arguments.decode(arguments)
        except msgspec.ValidationError as error:
            known = command.arguments.type.__struct_encode_fields__
            raise QMPError(_sentence(str(error), known)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise parse_error(error) from error
        return await command.handler(session, checked)


# msgspec's words -> QEMU's, in qapi/qobject-input-visitor.c. The path is "$.a[0].b" or missing.
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_TYPE = re.compile(r"Expected `(?P<type>[^`]*)`, got `[^`]*`")
_VALUE = re.compile(r"Invalid enum value (?P<value>.*)", re.DOTALL)
_AT = re.compile(r" - at `(?:key in )?\$(?P<path>[^`]*)`$")
_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _sentence(message: str, known: Sequence[str]) -> str:
    """What is wrong with an argument, in QEMU's words."""
    at = _AT.search(message)
    path = "" if at is None else at["path"].removeprefix(".")
    what = message if at is None else message[: at.start()]
    if match := _MISSING.fullmatch(what):
        return f"Parameter '{_joined(path, match['name'])}' is missing"
    if match := _UNKNOWN.fullmatch(what):
        there = "" if path else f"; there are {', '.join(known)}" if known else "; there are none"
        return f"Parameter '{_joined(path, shortened(match['name']))}' is unexpected{there}"
    if match := _TYPE.fullmatch(what):
        kinds = [_TYPES.get(kind, kind) for kind in match["type"].split(" | ") if kind != "null"]
        return f"Invalid parameter type for '{path}', expected: {' or '.join(kinds)}"
    if match := _VALUE.fullmatch(what):
        return f"Parameter '{path}' does not accept value {shortened(match['value'])}"
    return f"Parameter '{path}' expects {what.removeprefix('Expected ').replace('`', '')}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
