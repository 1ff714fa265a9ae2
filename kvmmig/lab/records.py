"""Records of migrations, read from their files: both sides of each, joined by the stream's identity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from kvmmig.errors import KvmmigError
from kvmmig.migration.events import (
    AnyEvent,
    Begun,
    Ended,
    RecordedEvent,
    RoundSent,
    SwitchedOver,
    decode_line,
)

T = TypeVar("T", bound=RecordedEvent)


class BadRecord(KvmmigError):
    """A file that is no record, or a record that lacks what is to be drawn."""


@dataclass(frozen=True)
class Side:
    """What one side has recorded, in the order of time."""

    begun: Begun
    events: Sequence[AnyEvent]

    def of(self, kind: type[T]) -> list[T]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def rounds(self) -> list[RoundSent]:
        """Those with their bytes, the final pass too."""
        return self.of(RoundSent)

    @property
    def switchover(self) -> SwitchedOver | None:
        """None where it did not come to that."""
        return next(iter(self.of(SwitchedOver)), None)

    @property
    def ended(self) -> Ended | None:
        """None where the record breaks off."""
        return next(iter(self.of(Ended)), None)


@dataclass(frozen=True)
class RecordedMigration:
    """One migration, as far as it was recorded: one side or both."""

    #: What it is called in pictures and files: its file's name, with a number where that has several.
    name: str
    source: Side | None = None
    destination: Side | None = None
    #: What others than its sides have recorded in the same file meanwhile.
    others: Sequence[AnyEvent] = field(default=())

    @property
    def sides(self) -> list[Side]:
        """Those that there are."""
        return [side for side in (self.source, self.destination) if side is not None]

    @property
    def one_clock(self) -> bool:
        """Whether the times of its two sides can be compared."""
        return len({side.begun.clock for side in self.sides}) == 1

    def sent(self) -> Side:
        """The source's side. Raises `BadRecord` where it is not there."""
        if self.source is None:
            raise BadRecord(f"{self.name}: the source's side was not recorded")
        return self.source


def read_records(paths: Iterable[str | os.PathLike[str]]) -> list[RecordedMigration]:
    """All migrations in these files, in the order of their begin.

    A last line that is cut off is passed over: its writer was killed. Raises `BadRecord` for what can't be
    read, or is no record, and for files with no migration in them.
    """
    sides: dict[str, list[tuple[str, Side]]] = {}
    others: list[tuple[str, AnyEvent]] = []
    for path in paths:
        stem = Path(path).stem
        for by, events in _read(Path(path)).items():
            begun = next((event for event in events if isinstance(event, Begun)), None)
            if begun is None or not by:
                others += [(stem, event) for event in events]
            else:
                side = Side(begun, sorted(events, key=lambda event: event.at))
                sides.setdefault(begun.stream, []).append((stem, side))
    if not sides:
        raise BadRecord(f"no migration is recorded in {', '.join(map(str, paths))}")
    in_order = sorted(sides.values(), key=lambda found: found[0][1].begun.wall)
    stems = [found[0][0] for found in in_order]
    return [_joined(_name(stems, number), found, others) for number, found in enumerate(in_order)]


def _name(stems: list[str], number: int) -> str:
    stem = stems[number]
    same = [index for index, each in enumerate(stems) if each == stem]
    return stem if len(same) == 1 else f"{stem}-{same.index(number) + 1}"


def _joined(
    name: str, found: list[tuple[str, Side]], others: list[tuple[str, AnyEvent]]
) -> RecordedMigration:
    by_side = {side.begun.side: side for _, side in found}
    first = min(side.begun.at for _, side in found)
    last = max(side.events[-1].at for _, side in found)
    files = {stem for stem, _ in found}
    meanwhile = [event for stem, event in others if stem in files and first <= event.at <= last]
    return RecordedMigration(
        name=name,
        source=by_side.get("source"),
        destination=by_side.get("destination"),
        others=meanwhile,
    )


def _read(path: Path) -> dict[str, list[AnyEvent]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRecord(f"{path}: {error.strerror}") from error
    found: dict[str, list[AnyEvent]] = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            decoded = decode_line(line)
        except ValueError as error:
            raise BadRecord(f"{path}, line {number} is no event of a record: {error}") from error
        if decoded is not None:
            found.setdefault(decoded[0], []).append(decoded[1])
    return found
