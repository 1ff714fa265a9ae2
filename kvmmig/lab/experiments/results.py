"""The results of an experiment: a directory with a row for each trial, which survives its runner."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec

from kvmmig.errors import KvmmigError
from kvmmig.lab.experiments.spec import Trial
from kvmmig.lab.table import columns_of, write_csv, write_parquet

Row = Mapping[str, Any]
_FIRST = ("trial", "repeat", "outcome")


class Results:
    """The rows so far. A row that is there is on disk; a trial's newest row counts."""

    def __init__(self, directory: Path, lock: int) -> None:
        """Use `open`."""
        self._path = directory / "results.jsonl"
        self._directory = directory
        self._lock = lock
        self._rows = {row["trial"]: row for row in read_rows(directory)}
        self._mend()

    @classmethod
    @contextmanager
    def open(cls, directory: Path) -> Iterator[Self]:
        """Make the directory, or go on in it. `KvmmigError` where another runner is at it."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "records").mkdir(exist_ok=True)
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise KvmmigError(f"no results can be kept in {directory}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise KvmmigError(f"another run of an experiment is at work in {directory}") from None
            yield cls(directory, lock)
        finally:
            os.close(lock)

    @property
    def rows(self) -> list[Row]:
        """In the order in which they came."""
        return list(self._rows.values())

    def record_of(self, trial: Trial, side: str) -> Path:
        """Where one side of a trial is recorded."""
        return self._directory / "records" / f"{trial.key}-{side}.jsonl"

    def row_of(self, trial: Trial) -> Row | None:
        """Its row; None before it was tried."""
        return self._rows.get(trial.key)

    def forget(self, which: Callable[[Row], bool]) -> None:
        """Have trials tried again; their rows on disk stay until there are newer ones."""
        self._rows = {key: row for key, row in self._rows.items() if not which(row)}

    def add(self, trial: Trial, figures: Row) -> Row:
        """Keep a row: it is on disk when this returns. Blocks for that long: not for the event loop."""
        row = {"trial": trial.key, "repeat": trial.repeat, **figures, **trial.parameters}
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[trial.key] = row
        return row

    def write_tables(self) -> list[Path]:
        """The rows as CSV and as Parquet."""
        rows = self.rows
        columns = [
            *_FIRST,
            *(name for name in columns_of(rows) if name not in _FIRST and any(name in row for row in rows)),
        ]
        csv, parquet = self._directory / "results.csv", self._directory / "results.parquet"
        write_csv(rows, csv, columns)
        write_parquet(rows, parquet, columns)
        return [csv, parquet]

    def _mend(self) -> None:
        """A line that a killed runner has left half written must not become part of the next one."""
        if self._path.exists() and (data := self._path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(self._path, data.rfind(b"\n") + 1)


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The newest row of each trial, in the order in which they were first tried; without a torn last line.

    Raises `KvmmigError` for a file that is none of results.
    """
    path = directory / "results.jsonl"
    if not path.exists():
        return []
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
            rows[row["trial"]] = row
        except (msgspec.DecodeError, KeyError) as error:
            raise KvmmigError(f"{path}, line {number} is no row of results: {error}") from error
    return list(rows.values())
