"""Progress over time: what was sent, what was left, what the policy decided and what somebody changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmmig.lab.pictures.style import BLACK, BLUE, GREY, ORANGE, PALE, house_style, legend_above, one_panel
from kvmmig.lab.records import BadRecord, RecordedMigration, Side
from kvmmig.migration.events import Changed, Decided, Sent, Stalled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIB = 1 << 20
#: Stalls so long are worth a mark.
_WORTH_A_MARK = 0.1
#: A line has at most so many points: a pixel has no use for more.
_POINTS = 2000


def draw_progress(migration: RecordedMigration) -> Figure:
    """MiB sent and MiB left over seconds. Decisions are marks on what was left, changes are lines across, a
    stall of 100 ms or more and the time with the guest stopped are shaded. `BadRecord` where nothing was
    sent."""
    side = migration.sent()
    sent = side.of(Sent)
    if not sent:
        raise BadRecord(f"{migration.name}: nothing was sent")
    begin = side.begun.at
    times = np.array([each.at + each.duration for each in sent]) - begin
    mib = np.cumsum([each.sent_bytes for each in sent]) / _MIB
    chosen = np.unique(np.linspace(0, len(times) - 1, min(len(times), _POINTS)).astype(int))
    with house_style():
        figure, axes = one_panel(2.3)
        axes.plot(times[chosen], mib[chosen], color=BLUE, label="sent")
        left_at, left = _left(side, begin)
        axes.plot(left_at, left, color=ORANGE, linestyle=(0, (4, 1)), marker=".", markersize=3, label="left")
        _shade(axes, side, begin)
        _mark_decisions(axes, side, begin)
        for number, change in enumerate(side.of(Changed)):
            at, late = change.at - begin, change.at - begin > 0.5 * times[-1]
            axes.axvline(at, color=GREY, linewidth=0.6)
            axes.annotate(
                f"{change.what} {_short(change.value)}".strip(),
                (at, 0.98 - 0.09 * (number % 5)),
                (-2 if late else 2, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                ha="right" if late else "left",
                fontsize=6,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("time since the migration began (s)")
        axes.set_ylabel("MiB")
        legend_above(axes, 4)
    return figure


def _left(side: Side, begin: float) -> tuple[list[float], list[float]]:
    """What was left to be sent: all at first, then what each round left, then nothing."""
    rounds = [each for each in side.rounds if not each.final]
    if not rounds:
        return [], []
    times = [rounds[0].at - begin]
    left = [side.begun.memory / _MIB]
    for each in rounds:
        times.append(each.at + each.duration - begin)
        left.append(each.dirty_pages * side.begun.page_size / _MIB)
    for each in side.rounds:
        if each.final:
            times.append(each.at + each.duration - begin)
            left.append(0.0)
    return times, left


def _shade(axes: Axes, side: Side, begin: float) -> None:
    if (switchover := side.switchover) is not None:
        at = switchover.at - begin
        axes.axvspan(at, at + switchover.downtime, color=PALE, zorder=0, linewidth=0, label="guest stopped")
    for stall in side.of(Stalled):
        if stall.duration >= _WORTH_A_MARK:
            at = stall.at - begin
            axes.axvspan(at, at + stall.duration, facecolor="none", edgecolor=GREY, hatch="////", linewidth=0)
            axes.annotate(
                stall.held_by,
                (at + stall.duration / 2, 0.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=6,
            )


def _mark_decisions(axes: Axes, side: Side, begin: float) -> None:
    left = {
        each.round: each.dirty_pages * side.begun.page_size / _MIB for each in side.rounds if not each.final
    }
    end = side.events[-1].at - begin
    marks = 0
    for each in side.of(Decided):
        if each.decision == "continue" and each.bandwidth is None and each.throttle is None:
            continue
        words: str = each.decision
        if each.throttle is not None:
            words = f"slow down {each.throttle:.0%}"
        elif each.bandwidth is not None and each.decision == "continue":
            words = f"{each.bandwidth / 1e6:.3g} MB/s"
        point = (each.at - begin, left.get(each.round, 0.0))
        axes.plot(*point, marker="v", color=BLACK, markersize=4, zorder=4)
        axes.annotate(
            words,
            point,
            (point[0], 0.32 + 0.08 * (marks % 4)),
            textcoords=("data", "axes fraction"),
            ha="right" if point[0] > 0.8 * end else "center",
            fontsize=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
            zorder=5,
        )
        marks += 1


def _short(value: str) -> str:
    try:
        return f"{float(value) / 1e6:.3g} MB/s"
    except ValueError:
        return value[:24]
