"""The pictures of an experiment: means of its repeats with 95 % confidence intervals, the model over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmmig.lab.experiments.intervals import mean_and_half_width
from kvmmig.lab.experiments.model import predict
from kvmmig.lab.experiments.results import Row
from kvmmig.lab.experiments.spec import NONE, BadSpec, PlotPart, Spec
from kvmmig.lab.pictures.album import save_figure
from kvmmig.lab.pictures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    house_style,
    legend_above,
    one_panel,
)
from kvmmig.units import parse_duration, parse_rate, parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (BLACK, "D"), (GREY, "v"))
#: How a column is shown: its name, and what it is divided by. Others are shown as they are.
_SHOWN = {
    "total_time": ("total time (s)", 1.0),
    "downtime": ("downtime (ms)", 1e-3),
    "expected_downtime": ("expected downtime (ms)", 1e-3),
    "cancel_latency": ("from the cancel to its end (ms)", 1e-3),
    "monitor_worst": ("worst answer of the monitor (ms)", 1e-3),
    "monitor_p99": ("answers of the monitor, 99 % (ms)", 1e-3),
    "bare_loop_worst": ("worst answer of a bare loop (ms)", 1e-3),
    "worst_step": ("worst step (ms)", 1e-3),
    "worst_stall": ("worst turn of the loop (ms)", 1e-3),
    "dirty_rate": ("dirty rate (MB/s)", 1e6),
    "rate": ("rate (MB/s)", 1e6),
    "sent_bytes": ("sent (MiB)", 1 << 20),
    "sent_share": ("pages sent / pages of memory", 1.0),
    "rounds": ("rounds", 1.0),
    "bandwidth": ("bandwidth (MB/s)", 1e6),
    "set.hot": ("hot set (MiB)", 1 << 20),
    "memory": ("memory (MiB)", 1 << 20),
    "downtime-limit": ("downtime limit (ms)", 1e-3),
    "set.pace": ("pages written a second", 1.0),
}
#: Parameters that are text with a unit, and numbers on an axis.
_PARSED: Mapping[str, Callable[[str], float]] = {
    "bandwidth": parse_rate,
    "set.hot": parse_size,
    "memory": parse_size,
    "downtime-limit": parse_duration,
}


@dataclass(frozen=True)
class _Point:
    x: float | str
    x_half: float
    y: float
    y_half: float
    rows: Sequence[Row]


def draw_spec(spec: Spec, rows: Sequence[Row], directory: Path, kind: str) -> list[Path]:
    """Draw what the spec asks for, into ``directory``. `BadSpec` for a column that no row has.

    Rows of trials that did not come to their end are left out.
    """
    if not spec.plot:
        raise BadSpec(
            f"the experiment {spec.name} asks for no picture: give it a [[plot]] with name, x and y"
        )
    whole = [row for row in rows if row["outcome"] in ("done", "cancelled")]
    if not whole:
        raise BadSpec(f"there are no results in {directory}; run the experiment first")
    return [
        save_figure(draw_plot(spec, plot, whole), directory / f"{plot.name}.{kind}") for plot in spec.plot
    ]


def draw_plot(spec: Spec, plot: PlotPart, rows: Sequence[Row]) -> Figure:
    """One picture: a line a value of ``by``, a point a combination of the other parameters."""
    for column in filter(None, (plot.x, plot.y, plot.by)):
        if not any(row.get(column) is not None for row in rows):
            known = sorted({name for row in rows for name in row})
            raise BadSpec(f"the picture {plot.name}: no result has {column!r}; there are {', '.join(known)}")
    groups = dict.fromkeys(str(row.get(plot.by, "")) for row in rows)
    with house_style():
        figure, axes = one_panel(2.3)
        for group, (colour, marker) in zip(groups, _LOOKS * len(groups), strict=False):
            points = _points(spec, plot, [row for row in rows if str(row.get(plot.by, "")) == group])
            _draw(axes, plot, points, group, colour, marker)
            if plot.model:
                _draw_model(axes, plot, points, colour)
        if plot.knee:
            _mark_knee(axes, rows)
        if plot.log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(_label(plot.x))
        axes.set_ylabel(_label(plot.y))
        if plot.by or plot.model:
            legend_above(axes, 1 if max(map(len, groups)) > 14 else 3)
    return figure


def _points(spec: Spec, plot: PlotPart, rows: Iterable[Row]) -> list[_Point]:
    combinations: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _value(row, plot.x) is not None and _value(row, plot.y) is not None:
            combinations.setdefault(tuple(row.get(name) for name in spec.varied), []).append(row)
    points = []
    for same in combinations.values():
        y, y_half = mean_and_half_width([float(_value(row, plot.y)) for row in same])
        xs = [_value(row, plot.x) for row in same]
        x, x_half = (xs[0], 0.0) if isinstance(xs[0], str) else mean_and_half_width(xs)
        points.append(_Point(x, x_half, y, y_half, same))
    return (
        points if any(isinstance(each.x, str) for each in points) else sorted(points, key=lambda each: each.x)
    )


def _value(row: Row, column: str) -> Any:
    value = row.get(column)
    if column in _PARSED and isinstance(value, str):
        if value == NONE:
            return None
        value = _PARSED[column](value)
    return value / _SHOWN.get(column, ("", 1.0))[1] if isinstance(value, int | float) else value


def _label(column: str) -> str:
    return _SHOWN.get(column, (column.replace("_", " "), 1.0))[0]


def _draw(axes: Axes, plot: PlotPart, points: list[_Point], group: str, colour: str, marker: str) -> None:
    names = any(isinstance(point.x, str) for point in points)
    axes.errorbar(
        [_short(str(point.x)) if names else point.x for point in points],
        [point.y for point in points],
        yerr=[point.y_half for point in points],
        xerr=None if names or plot.x in _PARSED else [float(point.x_half) for point in points],
        color=colour,
        marker=marker,
        markersize=3,
        linestyle="none" if names or plot.model else "-",
        linewidth=0.8,
        capsize=2,
        label=_short(group) or "measured",
    )
    if names:
        axes.tick_params(axis="x", rotation=25)


def _draw_model(axes: Axes, plot: PlotPart, points: list[_Point], colour: str) -> None:
    xs = [point.x for point in points]
    ys = [_predicted(point, plot.y) for point in points]
    axes.plot(xs, ys, color=colour, linestyle=(0, (4, 1)), linewidth=0.8, label="geometric model")


def _predicted(point: _Point, column: str) -> float:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    row: Mapping[str, Any] = point.rows[0]
    predicted = predict(
        memory=row["memory_bytes"],
        working_set=parse_size(str(row.get("set.hot", row["memory_bytes"]))),
        rate=mean(each["rate"] for each in point.rows),
        dirty_rate=mean(each["dirty_rate"] for each in point.rows),
        downtime_limit=parse_duration(str(row["downtime-limit"])),
    )
    if column == "total_time":  # the model begins when memory does
        return predicted.total_time + mean(each["setup_time"] for each in point.rows)
    if column not in ("downtime", "sent_bytes"):
        raise BadSpec(
            f"the geometric model says nothing of {column}; of total_time, downtime and sent_bytes it does"
        )
    return float(getattr(predicted, column)) / _SHOWN[column][1]


def _mark_knee(axes: Axes, rows: Sequence[Row]) -> None:
    """Where the dirty rate is the rate of sending: no round shrinks any more."""
    rate = float(np.median([row["rate"] for row in rows if row.get("rate")])) / _SHOWN["rate"][1]
    axes.axvline(rate, color=BLACK, linewidth=0.8, linestyle=(0, (5, 2)))
    axes.annotate(
        "rate of sending",
        (rate, 0.98),
        (-3, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=6.5,
    )


def _short(text: str) -> str:
    """A URI without what is the same for all, where there is little room."""
    return text.replace("{directory}/", "").replace("127.0.0.1:0", "").rstrip(":?")
