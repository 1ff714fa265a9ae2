"""Clark's chart: a bar a round, as wide as it lasted, as high as its rate, so its area is its bytes.

After Clark et al., "Live Migration of Virtual Machines", NSDI 2005, figures 8 to 11.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmig.lab.pictures.style import BLACK, BLUE, ORANGE, house_style, legend_above, one_panel
from kvmmig.lab.records import BadRecord, RecordedMigration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MB = 1e6
#: Share of the picture's width from which on a bar has its round's number above it.
_WIDE = 0.035


def draw_rounds(migration: RecordedMigration) -> Figure:
    """Bars in MB/s over seconds, and shaded, how fast the guest wrote. `BadRecord` without rounds."""
    side = migration.sent()
    rounds = [each for each in side.rounds if each.duration > 0]
    if not rounds:
        raise BadRecord(f"{migration.name}: it did not come to a first round")
    begin = rounds[0].at
    page_size = side.begun.page_size
    end = rounds[-1].at + rounds[-1].duration - begin
    with house_style():
        figure, axes = one_panel(2.2)
        shaded = False
        for each in rounds:
            left, rate = each.at - begin, each.sent_bytes / each.duration / _MB
            if not each.final:
                dirty = each.dirty_pages * page_size / each.duration / _MB
                axes.fill_between(
                    [left, left + each.duration],
                    dirty,
                    step="post",
                    color=ORANGE,
                    alpha=0.55,
                    linewidth=0,
                    zorder=3,
                    label=None if shaded else "guest wrote",
                )
                shaded = True
            axes.bar(
                left,
                rate,
                each.duration,
                align="edge",
                facecolor=BLACK if each.final else BLUE,
                edgecolor="white",
                linewidth=0.4,
                zorder=2,
                label=_label(each.final, each is rounds[0]),
            )
            if each.duration > _WIDE * end:
                axes.annotate(
                    str(each.round),
                    (left + each.duration / 2, rate),
                    (0, 1.5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=6.5,
                )
        axes.set_xlim(0, end)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
        axes.set_xlabel("time since the first round began (s)")
        axes.set_ylabel("rate (MB/s)")
        legend_above(axes, 3)
    return figure


def _label(final: bool, first: bool) -> str | None:
    if final:
        return "sent, it stood still"
    return "sent" if first else None
