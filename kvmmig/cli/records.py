"""What ``record``, ``plot`` and ``trace`` do."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from kvmmig.cli.printing import echo
from kvmmig.errors import KvmmigError
from kvmmig.lab.records import RecordedMigration, Side, read_records
from kvmmig.lab.table import columns_of, rows_of, write_csv, write_parquet
from kvmmig.migration.events import EventsLost
from kvmmig.units import format_duration, format_rate, format_size


def show_records(files: Sequence[Path]) -> int:
    """Say what is in the files; returns 0. Raises `KvmmigError`."""
    for migration in read_records(files):
        for line in _described(migration):
            echo(line)
    return 0


def export_records(files: Sequence[Path], csv_path: Path | None, parquet_path: Path | None) -> int:
    """Write the tables that were asked for; returns 0. Raises `KvmmigError`."""
    rows = rows_of(read_records(files))
    columns = columns_of(rows)
    for path, write in ((csv_path, write_csv), (parquet_path, write_parquet)):
        if path is not None:
            write(rows, path, columns)
            echo(f"{path}: {len(rows)} events")
    return 0


def plot_records(files: Sequence[Path], out: Path, kind: str) -> int:
    """Draw; returns 0. Raises `KvmmigError`."""
    migrations = read_records(files)
    from kvmmig.lab.pictures.album import draw_all

    drawn, missing = draw_all(migrations, out, kind)
    for path in drawn:
        echo(str(path))
    for sentence in missing:
        echo(f"kvmmig: {sentence}", err=True)
    return 0 if drawn else 1


def write_trace(files: Sequence[Path], out: Path) -> int:
    """Write the trace; returns 0. Raises `KvmmigError`."""
    from kvmmig.lab.trace import trace_of

    trace = trace_of(read_records(files))
    try:
        out.write_bytes(msgspec.json.encode(trace))
    except OSError as error:
        raise KvmmigError(f"the trace can't be written to {out}: {error.strerror}") from error
    echo(f"{out}: open it at https://ui.perfetto.dev")
    return 0


def dump_file(file: Path) -> int:
    """Explain a stream; returns 0. Raises `KvmmigError` at the first frame that is wrong."""
    from kvmmig.lab.streamdump import dump_stream

    for frame in dump_stream(file):
        echo(f"{frame.at:>12}  {frame.size:>10}  {frame.kind:<9} {frame.words}".rstrip())
    return 0


def _described(migration: RecordedMigration) -> list[str]:
    begun = migration.sides[0].begun
    when = datetime.fromtimestamp(begun.wall).isoformat(sep=" ", timespec="seconds")
    lines = [f"{migration.name}: {begun.guest}, {format_size(begun.memory)}, {when}, stream {begun.stream}"]
    lines += [line for side in migration.sides for line in _side(side)]
    if len(migration.sides) == 2 and not migration.one_clock:
        lines.append("  the two sides were recorded by different clocks")
    return lines


def _side(side: Side) -> list[str]:
    begun, ended = side.begun, side.ended
    lost = sum(each.count for each in side.of(EventsLost))
    host = begun.host
    lines = [
        f"  {begun.side} {begun.uri}, on {host.name} (Linux {host.kernel}, {host.cpus} CPUs, kvmmig "
        f"{host.kvmmig}): {len(side.events)} events" + (f", {lost} lost" if lost else "")
    ]
    if ended is None:
        return [*lines, "    the record breaks off before the end"]
    parts = [f"{ended.outcome} after {format_duration(ended.total_time)}", format_size(ended.bytes)]
    if ended.downtime is not None:
        parts.append(f"downtime {format_duration(ended.downtime)}")
    lines.append(f"    {', '.join(parts)}{': ' + ended.error if ended.error else ''}")
    for each in side.rounds:
        name = "final pass" if each.final else f"round {each.round}"
        rate = format_rate(each.sent_bytes / each.duration) if each.duration else "-"
        lines.append(
            f"    {name:<11}{format_duration(each.duration):>10}{each.sent_pages:>9} pages  {rate:>12}  "
            f"{each.dirty_pages} written meanwhile"
        )
    return lines
