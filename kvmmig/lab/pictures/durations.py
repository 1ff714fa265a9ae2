"""How long steps, turns of the event loop and the monitor's answers took: histograms on a log axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmmig.lab.pictures.style import BLACK, BLUE, GREEN, GREY, ORANGE, duration, house_style, one_panel
from kvmmig.lab.records import BadRecord, RecordedMigration
from kvmmig.migration.events import Answered
from kvmmig.migration.stall_meter import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Buckets = Sequence[tuple[float, int]]
_LOOKS = ((BLUE, "-"), (ORANGE, "-"), (GREEN, (0, (4, 1))), (BLACK, (0, (1, 1))), (GREY, "-."))
#: A bucket's lower edge: there are eight for each doubling.
_RATIO = 2 ** (-1 / 8)


def draw_durations(migration: RecordedMigration) -> Figure:
    """How many steps, turns and answers took how long, both axes logarithmic, with the bound of a step.

    Each line ends at the worst. `BadRecord` where the record broke off.
    """
    found: list[tuple[str, _Buckets, float]] = []
    bound = None
    for side in migration.sides:
        if (ended := side.ended) is None:
            continue
        if ended.steps is not None:
            found.append(("steps", ended.steps.buckets, ended.steps.worst))
            bound = ended.step_bound
        found.append((f"loop turns, {side.begun.side}", ended.turns.buckets, ended.turns.worst))
    answers: dict[str, Histogram] = {}
    for event in migration.others:
        if isinstance(event, Answered):
            answers.setdefault(event.who, Histogram()).add(event.duration)
    found += [
        (f"answers of {who}", (taken := histogram.snapshot()).buckets, taken.worst)
        for who, histogram in answers.items()
    ]
    found = [each for each in found if each[1]]
    if not found:
        raise BadRecord(f"{migration.name}: the record breaks off before its histograms")
    with house_style():
        figure, axes = one_panel(2.5)
        for (name, buckets, worst), (colour, line) in zip(found, _LOOKS, strict=False):
            edges, heights = _outline(buckets)
            axes.stairs(
                heights, edges, color=colour, linestyle=line, label=f"{name} (worst {duration(worst)})"
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        if bound is not None:
            axes.axvline(bound, color=BLACK, linewidth=0.8, linestyle=(0, (5, 2)))
            axes.annotate(
                f"bound {duration(bound)}",
                (bound, 1),
                (2, -1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=6.5,
            )
        axes.xaxis.set_major_formatter(lambda value, _: duration(value))
        axes.set_xlabel("took")
        axes.set_ylabel("how many")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=1, handlelength=2.2, borderaxespad=0.2)
    return figure


def _outline(buckets: _Buckets) -> tuple[list[float], list[float]]:
    """Edges and heights, with the gaps between the buckets as zeros."""
    edges, heights = [buckets[0][0] * _RATIO], list[float]()
    for upper, count in buckets:
        lower = upper * _RATIO
        if lower > edges[-1] * 1.001:
            edges.append(lower)
            heights.append(0)
        edges.append(upper)
        heights.append(count)
    return edges, heights
