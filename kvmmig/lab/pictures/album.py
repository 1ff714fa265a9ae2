"""All pictures of some migrations, into a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmmig.errors import KvmmigError
from kvmmig.lab.pictures.comparison import draw_comparison
from kvmmig.lab.pictures.downtime import draw_downtime
from kvmmig.lab.pictures.durations import draw_durations
from kvmmig.lab.pictures.pages import draw_pages
from kvmmig.lab.pictures.progress import draw_progress
from kvmmig.lab.pictures.rounds import draw_rounds
from kvmmig.lab.pictures.style import house_style
from kvmmig.lab.records import BadRecord, RecordedMigration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Those of one migration, by the end of their files' names.
PICTURES: Mapping[str, Callable[[RecordedMigration], Figure]] = {
    "rounds": draw_rounds,
    "pages": draw_pages,
    "durations": draw_durations,
    "downtime": draw_downtime,
    "progress": draw_progress,
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture; its format is what the name ends in. Raises `KvmmigError` where that can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with house_style():
            figure.savefig(path)
    except OSError as error:
        raise KvmmigError(f"the picture can't be written to {path}: {error.strerror}") from error
    return path


def draw_all(
    migrations: Sequence[RecordedMigration], directory: Path, kind: str
) -> tuple[list[Path], list[str]]:
    """Draw all of them as files of this ``kind`` (png, pdf, svg): the files, and why others are not there."""
    files: list[Path] = []
    missing: list[str] = []
    for migration in migrations:
        for name, draw in PICTURES.items():
            try:
                figure = draw(migration)
            except BadRecord as error:
                missing.append(f"no picture {migration.name}-{name}: {error}")
            else:
                files.append(save_figure(figure, directory / f"{migration.name}-{name}.{kind}"))
    if len(migrations) > 1:
        files.append(save_figure(draw_comparison(migrations), directory / f"comparison.{kind}"))
    return files, missing
