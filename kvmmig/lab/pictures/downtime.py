"""The downtime, split: what the guest stood still for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmmig.lab.pictures.style import BLACK, BLUE, GREY, PALE, duration, house_style, one_panel
from kvmmig.lab.records import BadRecord, RecordedMigration
from kvmmig.migration.events import GuestStarted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = {
    "park": "vCPUs parked",
    "proceed": "told to proceed",
    "capture": "state read",
    "last_log": "last dirty log",
    "pages": "last pages sent",
    "state": "state sent",
    "flush": "ready there, or on disk",
    "commit": "handed over",
}


def draw_downtime(migration: RecordedMigration) -> Figure:
    """A bar for each part, where the former one ended; in milliseconds since the guest was stopped.

    A line says when the guest ran at the destination, where that was recorded by the same clock. `BadRecord`
    where the guest did not move.
    """
    side = migration.sent()
    if (switchover := side.switchover) is None:
        raise BadRecord(f"{migration.name}: the guest did not move, so there was no downtime")
    parts = {
        name: seconds for name, seconds in switchover.parts().items() if name != "proceed" or seconds > 1e-3
    }
    total = switchover.downtime
    with house_style():
        figure, axes = one_panel(1.0 + 0.17 * len(parts))
        left = 0.0
        for row, seconds in enumerate(parts.values()):
            axes.barh(row, seconds * 1e3, left=left * 1e3, color=BLUE, height=0.7)
            beyond = left + seconds > 0.72 * total
            axes.annotate(
                duration(seconds),
                ((left if beyond else left + seconds) * 1e3, row),
                (-3 if beyond else 3, 0),
                textcoords="offset points",
                va="center",
                ha="right" if beyond else "left",
                fontsize=6.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=3,
            )
            if left:
                axes.plot([left * 1e3] * 2, [row - 1, row], color=GREY, linewidth=0.4, zorder=0)
            left += seconds
        started = (
            migration.destination.of(GuestStarted) if migration.destination and migration.one_clock else []
        )
        for each in started:
            at = (each.at - switchover.at) * 1e3
            axes.axvline(at, color=BLACK, linewidth=0.8, linestyle=(0, (5, 2)))
            axes.annotate(
                f"runs there, after {duration(at / 1e3)}",
                (at, 1),
                (-2, 1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6.5,
            )
        axes.barh(len(parts), total * 1e3, color=PALE, height=0.7)
        axes.annotate(
            duration(total), (0, len(parts)), (3, 0), textcoords="offset points", va="center", fontsize=6.5
        )
        axes.set_yticks(range(len(parts) + 1), [*(_WORDS[name] for name in parts), "in all"])
        axes.set_ylim(len(parts) + 0.5, -0.5)
        axes.set_xlim(0, total * 1e3)
        axes.set_xlabel("time since the guest was stopped (ms)")
    return figure
