"""What ``experiment`` does."""

from __future__ import annotations

from pathlib import Path

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import echo
from kvmmig.lab.experiments.results import Results, Row, read_rows
from kvmmig.lab.experiments.runner import run_experiment
from kvmmig.lab.experiments.spec import Spec, read_spec, trials_of
from kvmmig.units import format_duration

_DONE = ("done", "cancelled")


def run_spec(path: Path, out: Path | None, again: str | None) -> int:
    """Run what is left to be run; returns 0, or 1 where a trial did not come to its end."""
    spec = read_spec(path)
    directory = out if out is not None else Path(spec.name)
    trials = trials_of(spec)
    with Results.open(directory) as results:
        if again is not None:
            results.forget(lambda row: bool(row.get("starved")) if again == "starved" else _failed(row))

        async def command() -> int:
            await run_experiment(trials, results, lambda *news: _say(spec, *news))
            return 0

        status = run_to_end(command)
        for table in results.write_tables():
            echo(str(table))
        rows = [row for row in map(results.row_of, trials) if row is not None]
    starved = sum(bool(row.get("starved")) for row in rows)
    failed = sum(_failed(row) for row in rows)
    echo(f"{len(rows)} of {len(trials)} trials, {failed} failed, {starved} starved of CPU by the host")
    return status or (1 if failed else 0)


def plot_spec(path: Path, out: Path | None, kind: str) -> int:
    """Draw; returns 0. Raises `KvmmigError`."""
    spec = read_spec(path)
    directory = out if out is not None else Path(spec.name)
    from kvmmig.lab.experiments.drawing import draw_spec

    for file in draw_spec(spec, read_rows(directory), directory, kind):
        echo(str(file))
    return 0


def _failed(row: Row) -> bool:
    return row["outcome"] not in _DONE


def _say(spec: Spec, done: int, count: int, left: float, row: Row) -> None:
    varied = ", ".join(f"{name} {row[name]}" for name in spec.varied)
    figures = [row["outcome"]]
    if row.get("downtime") is not None:
        figures.append(f"downtime {format_duration(row['downtime'])}")
    if row.get("total_time") is not None:
        figures.append(f"total {format_duration(row['total_time'])}")
    if row.get("error"):
        figures.append(str(row["error"]))
    if row.get("starved"):
        figures.append("starved")
    echo(f"{done}/{count}  {varied}: {', '.join(figures)}; about {format_duration(left)} left")
