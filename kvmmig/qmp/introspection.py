"""``query-qmp-schema``: what there is to be commanded and heard, made from what the code runs on.

The reply is a list of QEMU's ``SchemaInfo``, qapi/introspect.json in QEMU's sources. What a command takes is
exact. What it returns is ``any``, unless it returns nothing: replies may gain members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import inspect

from kvmmig.qmp.table import CommandTable

_ANY = "any"
_JSON_TYPES = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
    "null": "null",
    _ANY: "value",
}
_SCALARS: Mapping[type[inspect.Type], str] = {
    inspect.StrType: "str",
    inspect.IntType: "int",
    inspect.FloatType: "number",
    inspect.BoolType: "bool",
    inspect.NoneType: "null",
}


def describe(table: CommandTable, events: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All commands of ``table``, and all ``events`` with their data's members and types."""
    types = _Types()
    nothing = types.object({})
    described: list[dict[str, Any]] = [
        {
            "name": name,
            "meta-type": "command",
            "arg-type": types.of(table.arguments(name)),
            "ret-type": _ANY if table.replies(name) else nothing,
        }
        for name in table.names()
    ]
    for event, members in events.items():
        described.append({"name": event, "meta-type": "event", "arg-type": types.object(members)})
    return described + types.described


class _Types:
    """The types that are in use, each described once; all but the built-in ones are called by numbers."""

    def __init__(self) -> None:
        self._names: dict[object, str] = {}
        self.described: list[dict[str, Any]] = [
            {"name": name, "meta-type": "builtin", "json-type": kind} for name, kind in _JSON_TYPES.items()
        ]

    def of(self, annotation: Any) -> str:
        """The name of a type, which is described from here on."""
        return self._name(inspect.type_info(annotation))

    def object(self, members: Mapping[str, Any]) -> str:
        """The name of an object with these members; only one whose name begins with a star may be missing."""
        return self._object([self._named(name, kind) for name, kind in members.items()])

    def _named(self, name: str, kind: Any) -> dict[str, Any]:
        member = {"name": name.removeprefix("*"), "type": self.of(kind)}
        return {**member, "default": None} if name.startswith("*") else member

    def _name(self, kind: inspect.Type) -> str:
        match kind:
            case inspect.StructType(fields=fields):
                return self._object([self._member(field) for field in fields])
            case inspect.LiteralType(values=values):
                return self._enum([str(value) for value in values])
            case inspect.ListType(item_type=element) | inspect.VarTupleType(item_type=element):
                return self._array(self._name(element))
            case inspect.UnionType(types=choices):
                return self._choice(choices)
            case inspect.Metadata(type=inner):
                return self._name(inner)
        return _SCALARS.get(type(kind), _ANY)

    def _choice(self, choices: Iterable[inspect.Type]) -> str:
        names = [self._name(one) for one in choices]
        return self._new({"meta-type": "alternate", "members": [{"type": name} for name in names]})

    def _member(self, field: inspect.Field) -> dict[str, Any]:
        member = {"name": field.encode_name, "type": self._name(field.type)}
        return member if field.required else {**member, "default": None}

    def _object(self, members: Sequence[dict[str, Any]]) -> str:
        return self._new({"meta-type": "object", "members": list(members)})

    def _enum(self, values: Sequence[str]) -> str:
        members = [{"name": value} for value in values]
        return self._new({"meta-type": "enum", "members": members, "values": list(values)})

    def _array(self, element: str) -> str:
        return self._new({"meta-type": "array", "element-type": element}, f"[{element}]")

    def _new(self, described: dict[str, Any], name: str = "") -> str:
        """What is alike has one name."""
        key = msgspec.json.encode(described)
        if key not in self._names:
            self._names[key] = name or str(len(self._names))
            self.described.append({"name": self._names[key], **described})
        return self._names[key]
