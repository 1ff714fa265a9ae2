"""Several migrations side by side: how long, how long stopped, how much was sent for how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmmig.lab.pictures.style import BLUE, duration, house_style, new_figure
from kvmmig.lab.records import BadRecord, RecordedMigration

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_comparison(migrations: Sequence[RecordedMigration]) -> Figure:
    """Three panels of bars; what did not move has no downtime. `BadRecord` where no record is whole."""
    ended = [
        (each.name, each.source.begun, each.source.ended)
        for each in migrations
        if each.source is not None and each.source.ended is not None
    ]
    if not ended:
        raise BadRecord("there is no migration whose source was recorded to its end, so nothing to compare")
    names = [name if end.outcome == "done" else f"{name} ({end.outcome})" for name, _, end in ended]
    columns = (
        ("total time", [end.total_time for _, _, end in ended], duration),
        ("downtime", [end.downtime or 0.0 for _, _, end in ended], duration),
        (
            "sent / memory",
            [end.bytes / begun.memory if begun.memory else 0.0 for _, begun, end in ended],
            "{:.2f}".format,
        ),
    )
    with house_style():
        figure = new_figure(0.75 + 0.2 * len(ended))
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (title, values, words) in zip(panels, columns, strict=True):
            bars = axes.barh(range(len(ended)), values, color=BLUE, height=0.6)
            axes.bar_label(bars, [words(value) for value in values], padding=2, fontsize=6.5)
            axes.set_xlim(0, max(*values, 1e-9) * 1.7)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_title(title)
        panels[0].set_yticks(range(len(ended)), names)
        panels[0].set_ylim(len(ended) - 0.5, -0.5)
    return figure
