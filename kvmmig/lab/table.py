"""A record as a table: a row an event, a column a field, for whatever reads CSV or Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmmig.errors import KvmmigError
from kvmmig.lab.extras import needed_for
from kvmmig.lab.records import RecordedMigration

_FIRST = ("migration", "side", "stream", "event", "at")


def rows_of(migrations: Sequence[RecordedMigration]) -> list[dict[str, Any]]:
    """One flat mapping an event. What is no number and no text in it stands as JSON."""
    rows = []
    for migration in migrations:
        for side in migration.sides:
            for event in side.events:
                fields = msgspec.to_builtins(event)
                head = {
                    "migration": migration.name,
                    "side": side.begun.side,
                    "stream": side.begun.stream,
                }
                rows.append(head | {name: _flat(value) for name, value in fields.items()})
    return rows


def _flat(value: Any) -> Any:
    return msgspec.json.encode(value).decode() if isinstance(value, dict | list | tuple) else value


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All columns that any row has, those that all have first."""
    names = dict.fromkeys(_FIRST)
    for row in rows:
        names.update(dict.fromkeys(row))
    return list(names)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str]) -> None:
    """RFC 4180, with a header; nothing where a row has no such column. `KvmmigError` where it can't be."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise KvmmigError(f"the table can't be written to {path}: {error.strerror}") from error


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path, columns: Sequence[str]) -> None:
    """The same as Parquet. Raises `ExtraMissing` without polars, `KvmmigError` where it can't be written."""
    with needed_for("a Parquet table"):
        import polars
    data = {name: [row.get(name) for row in rows] for name in columns}
    frame = polars.DataFrame({name: _same_kind(values) for name, values in data.items()}, strict=False)
    try:
        frame.write_parquet(path)
    except OSError as error:
        raise KvmmigError(f"the table can't be written to {path}: {error.strerror or error}") from error


def _same_kind(values: list[Any]) -> list[Any]:
    """A column has one type: where it has several, and they are not all numbers, text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) > 1:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return values
