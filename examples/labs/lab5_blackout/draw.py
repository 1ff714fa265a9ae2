"""Draws what was measured: ``python draw.py [runs.json] [picture.png]``.

A row a run. A dot is a step: when it began, how long it took, in seconds. Crosses are the monitor's answers.
Shaded is the host's load. On the right: how many steps took how long (grey), and their share of the time.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from saving import Run, read_runs

from kvmmig.lab.pictures.style import BLACK, BLUE, GREY, ORANGE, PALE, WIDTH, house_style

_SHADES = {"disk": PALE, "cpu": ORANGE, "calm": "none"}
_LEAST = 1e-5  # seconds


def draw(runs: list[Run]) -> Figure:
    """All runs, one below the other, on the same axes."""
    figure = Figure(figsize=(2 * WIDTH, 0.3 + 1.4 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 2, sharex="col", sharey=True, squeeze=False, width_ratios=[3, 1])
    for run, (over_time, counted) in zip(runs, panels, strict=True):
        _draw_steps(over_time, run)
        _draw_counts(counted, run)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    panels[-1][0].set_xlabel("since the save began (s)")
    panels[-1][1].set_xlabel("steps, and their time (%)")
    return figure


def _draw_steps(axes: Axes, run: Run) -> None:
    ends = [*(at for at, _ in run.parts[1:]), run.total]
    for (at, name), end in zip(run.parts, ends, strict=True):
        if at < run.total:
            axes.axvspan(max(at, 0), min(end, run.total), color=_SHADES[name], alpha=0.4, linewidth=0)
            axes.text(max(at, 0), 1.0, name, transform=axes.get_xaxis_transform(), va="bottom", fontsize=6)
    asked = [(at, took) for at, took in run.answers if 0 <= at <= run.total]
    style: dict[str, Any] = {
        "color": GREY,
        "markersize": 2,
        "markeredgewidth": 0.4,
        "label": "an answer of the monitor",
    }
    axes.plot(*zip(*asked, strict=True), "x", **style)
    for full, colour in ((True, BLACK), (False, BLUE)):
        points = [(at, max(took, _LEAST)) for at, took, how in run.steps if (how == "full") is full]
        label = "a step that ended on EAGAIN" if full else "a step that ended without"
        if points:
            style = {"color": colour, "markersize": 2.2, "markeredgewidth": 0, "label": label}
            axes.plot(*zip(*points, strict=True), "o", **style)
    axes.axhline(0.010, color=ORANGE, linewidth=0.6)
    axes.set_yscale("log")
    axes.set_ylabel(f"{run.way}\nseconds", fontsize=6.5)


def _draw_counts(axes: Axes, run: Run) -> None:
    """A bar a third of a decade: its share of all steps, and of all time that was spent in steps."""
    taken = [max(took, _LEAST) for _, took, _ in run.steps]
    buckets = [math.floor(3 * math.log10(took)) for took in taken]
    whole = sum(taken)
    for bucket in set(buckets):
        here = [took for took, its in zip(taken, buckets, strict=True) if its == bucket]
        low, height = 10 ** (bucket / 3), 10 ** ((bucket + 1) / 3) - 10 ** (bucket / 3)
        axes.barh(low, 100 * len(here) / len(taken), height, align="edge", color=GREY)
        axes.barh(
            low, 100 * sum(here) / whole, height, align="edge", fill=False, edgecolor=BLACK, linewidth=0.6
        )


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "runs.json")
    with house_style():
        draw(read_runs(where)).savefig(sys.argv[2] if len(sys.argv) > 2 else where.with_suffix(".png"))
