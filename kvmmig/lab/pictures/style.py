"""How all pictures look: as wide as a column of a paper, legible there in grey, and to the colour-blind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvmmig.lab.extras import needed_for

with needed_for("a picture"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches: a column of most papers.
WIDTH = 3.4
# Of Okabe and Ito's colours, which the colour-blind tell apart; these also differ as greys.
BLUE, ORANGE, GREEN, BLACK, GREY, PALE = "#0072B2", "#E69F00", "#009E73", "#000000", "#777777", "#D9D9D9"
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@contextmanager
def house_style() -> Iterator[None]:
    """What is drawn, or saved, in this block looks like the other pictures. Leaves no setting behind."""
    with matplotlib.rc_context(
        {
            "font.size": 7.5,
            "axes.titlesize": 7.5,
            "axes.labelsize": 7.5,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 6.5,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "lines.linewidth": 1.0,
            "hatch.linewidth": 0.5,
            "savefig.dpi": 300,
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
        }
    ):
        yield


def new_figure(height: float) -> Figure:
    """An empty figure, ``height`` inches high, of no window system."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def one_panel(height: float) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = new_figure(height)
    return figure, figure.add_subplot()


def duration(seconds: float) -> str:
    """A duration as a label: three digits and a unit."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} µs" if seconds else "0"


def legend_above(axes: Axes, columns: int) -> None:
    """A legend where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.0,
        borderaxespad=0.2,
        handletextpad=0.5,
    )
