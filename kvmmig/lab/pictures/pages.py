"""The page map over the rounds: which parts of memory the guest goes on writing, and what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmmig.lab.pictures.style import house_style, new_figure
from kvmmig.lab.records import BadRecord, RecordedMigration
from kvmmig.migration.events import PagesMapped

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 1 << 20


def draw_pages(migration: RecordedMigration) -> Figure:
    """Memory from left to right, rounds downwards; above, the share of each block that is pending after the
    round, below, how often its pages have been sent. `BadRecord` where there is no map."""
    side = migration.sent()
    maps = side.of(PagesMapped)
    if not maps:
        raise BadRecord(f"{migration.name}: no page map was recorded")
    n_pages = side.begun.memory // side.begun.page_size
    size = maps[0].block_pages
    count = len(maps[0].pending)
    edges = np.minimum(np.arange(count + 1) * size, n_pages or count * size)
    pages = np.maximum(np.diff(edges), 1)
    rounds = np.arange(len(maps) + 1) - 0.5
    with house_style():
        figure = new_figure(1.3 + min(0.16 * len(maps), 2.2) * 2)
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, values, label, most in (
            (upper, [each.pending for each in maps], "pending", 1.0),
            (lower, [each.sent for each in maps], "times sent", None),
        ):
            shares: npt.NDArray[np.float64] = np.array(values, np.float64) / pages
            mesh = axes.pcolormesh(
                edges * side.begun.page_size / _MIB,
                rounds,
                shares,
                cmap="Greys",
                vmin=0,
                vmax=most if most is not None else max(float(shares.max()), 1.0),
            )
            bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=12)
            bar.set_label(label)
            bar.outline.set_linewidth(0.4)
            _number_rounds(axes, len(maps))
        lower.set_xlabel("guest memory (MiB)")
    return figure


def _number_rounds(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(np.arange(0, count, max(1, -(-count // 8))))
    axes.set_ylabel("round")
