"""``record``, ``plot`` and ``trace``: what is made of recorded migrations."""

from __future__ import annotations

from pathlib import Path

import click

from kvmmig.cli.arguments import examples

_files = click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))


@click.group(
    short_help="Show or export what --record has recorded.", epilog=examples("kvmmig record show a.jsonl")
)
def record() -> None:
    """Show or export the records of migrations that "migrate --record FILE" and others have made."""


@record.command(epilog=examples("kvmmig record show a.jsonl"))
@_files
def show(files: tuple[Path, ...]) -> int:
    """Say which migrations are recorded in FILE, and how they went."""
    from kvmmig.cli.records import show_records

    return show_records(files)


@record.command(
    epilog=examples(
        "kvmmig record export a.jsonl --csv a.csv", "kvmmig record export *.jsonl --parquet all.parquet"
    )
)
@_files
@click.option("--csv", "csv_path", metavar="OUT", type=click.Path(path_type=Path), help="Write CSV there.")
@click.option(
    "--parquet", "parquet_path", metavar="OUT", type=click.Path(path_type=Path), help="Write Parquet there."
)
def export(files: tuple[Path, ...], csv_path: Path | None, parquet_path: Path | None) -> int:
    """Write all events of FILE as a table, a row an event."""
    if csv_path is None and parquet_path is None:
        raise click.UsageError("say where to: --csv OUT, --parquet OUT or both")
    from kvmmig.cli.records import export_records

    return export_records(files, csv_path, parquet_path)


@click.group(short_help="Look into a stream that was kept.", epilog=examples("kvmmig stream dump kept"))
def stream() -> None:
    """Look into the stream of a migration that tap+ has kept. "kvmmig image" looks into saved guests."""


@stream.command(epilog=examples("kvmmig stream dump kept", "kvmmig stream dump kept.back"))
@click.argument("file", type=click.Path(path_type=Path))
def dump(file: Path) -> int:
    """Explain the stream in FILE frame by frame, and check it as a destination does.

    The exit status is 1 where it is not whole.
    """
    from kvmmig.cli.records import dump_file

    return dump_file(file)


@click.command(
    short_help="Draw pictures of recorded migrations.",
    epilog=examples(
        "kvmmig plot a.jsonl --out pictures", "kvmmig plot a.jsonl b.jsonl --out pictures --format pdf"
    ),
)
@_files
@click.option(
    "--out", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Where the pictures go."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["png", "pdf", "svg"]),
    default="png",
    show_default=True,
    help="What kind of file.",
)
def plot(files: tuple[Path, ...], out: Path, kind: str) -> int:
    """Draw the migrations recorded in FILE: for each a picture of its rounds (Clark's chart), its pages, its
    durations, its downtime, its progress; for several, a comparison.

    They are as wide as a column of a paper, and legible in grey.
    """
    from kvmmig.cli.records import plot_records

    return plot_records(files, out, kind)


@click.command(
    short_help="Make a trace of recorded migrations, for Perfetto.",
    epilog=examples("kvmmig trace a.jsonl --out a.trace.json"),
)
@_files
@click.option(
    "--out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Where the trace goes."
)
def trace(files: tuple[Path, ...], out: Path) -> int:
    """Write the migrations recorded in FILE as a Chrome trace: https://ui.perfetto.dev shows it."""
    from kvmmig.cli.records import write_trace

    return write_trace(files, out)
