"""The pictures say what the record says: checked on the figures' own artists."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.patches import Rectangle

from kvmmig.cli.app import cli
from kvmmig.lab.pictures.comparison import draw_comparison
from kvmmig.lab.pictures.downtime import draw_downtime
from kvmmig.lab.pictures.durations import draw_durations
from kvmmig.lab.pictures.pages import draw_pages
from kvmmig.lab.pictures.progress import draw_progress
from kvmmig.lab.pictures.rounds import draw_rounds
from kvmmig.lab.records import BadRecord, RecordedMigration, read_records

from .example import MIB, begun, destination, ended, source, write


@pytest.fixture
def migration(tmp_path: Path) -> RecordedMigration:
    return read_records([write(tmp_path / "a.jsonl", source(), destination())])[0]


def bars(axes: object) -> list[Rectangle]:
    patches: list[Rectangle] = axes.patches  # type: ignore[attr-defined]  # an Axes
    return [each for each in patches if isinstance(each, Rectangle)]


def test_the_area_of_a_bar_is_the_bytes_of_its_round(migration: RecordedMigration) -> None:
    (axes,) = draw_rounds(migration).axes
    assert [bar.get_width() * bar.get_height() * 1e6 for bar in bars(axes)] == [
        pytest.approx(size * MIB) for size in (64, 16, 8)
    ]
    assert [bar.get_width() for bar in bars(axes)] == [pytest.approx(each) for each in (1.0, 0.25, 0.101)]
    assert [bar.get_x() for bar in bars(axes)] == [pytest.approx(each) for each in (0, 1.0, 1.304)]


def test_what_is_shaded_is_what_the_guest_wrote(migration: RecordedMigration) -> None:
    (axes,) = draw_rounds(migration).axes
    heights = [np.asarray(each.get_paths()[0].vertices)[:, 1].max() for each in axes.collections]
    assert heights == [pytest.approx(4096 * 4096 / 1.0 / 1e6), pytest.approx(2048 * 4096 / 0.25 / 1e6)]


def test_the_parts_of_the_downtime_stand_one_behind_the_other(migration: RecordedMigration) -> None:
    (axes,) = draw_downtime(migration).axes
    *parts, total = bars(axes)
    assert total.get_width() == pytest.approx(120)
    assert sum(bar.get_width() for bar in parts) == pytest.approx(120)
    for one, following in pairwise(parts):
        assert following.get_x() == pytest.approx(one.get_x() + one.get_width())
    assert "runs there, after 117 ms" in [text.get_text() for text in axes.texts]


def test_the_histograms_count_all_and_have_a_log_axis_and_the_bound(migration: RecordedMigration) -> None:
    (axes,) = draw_durations(migration).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    counts = [sum(patch.get_data().values) for patch in axes.patches]  # type: ignore[attr-defined]  # StepPatch
    assert counts == [3, 3, 3, 1]
    assert any(line.get_xdata()[0] == 0.01 for line in axes.lines)  # type: ignore[index]  # an array
    assert "steps (worst 10.1 ms)" in [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]


def test_the_page_map_has_a_row_a_round_and_its_shares(migration: RecordedMigration) -> None:
    upper, lower = (axes for axes in draw_pages(migration).axes if axes.get_ylabel() == "round")
    assert upper.collections[0].get_array().tolist() == [[1, 0, 0, 0], [0.5, 0, 0, 0]]  # type: ignore[union-attr]
    assert lower.collections[0].get_array().tolist() == [[1, 1, 1, 1], [2, 1, 1, 1]]  # type: ignore[union-attr]


def test_progress_ends_with_all_sent_and_nothing_left_and_has_the_decisions(
    migration: RecordedMigration,
) -> None:
    (axes,) = draw_progress(migration).axes
    sent, left = axes.lines[:2]
    assert list(sent.get_ydata())[-1] == pytest.approx(88)  # type: ignore[arg-type]  # an array
    assert list(left.get_ydata()) == [pytest.approx(each) for each in (64, 16, 8, 0)]  # type: ignore[arg-type]
    texts = [text.get_text() for text in axes.texts]
    assert {"slow down 20%", "stop", "bandwidth 100 MB/s", "link"} <= set(texts)


def test_a_comparison_has_a_bar_each_in_three_panels(migration: RecordedMigration) -> None:
    panels = draw_comparison([migration, migration]).axes
    assert [[bar.get_width() for bar in bars(axes)] for axes in panels] == [
        [2.0, 2.0],
        [0.12, 0.12],
        [88 / 64, 88 / 64],
    ]


def test_all_of_them_are_drawn_and_what_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    short = [begun("source", 20.0, stream="f" * 32), ended(21.0)]
    path, out = write(tmp_path / "a.jsonl", source(), short), tmp_path / "out"
    done = CliRunner().invoke(cli, ["plot", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(each.name for each in out.iterdir()) == [
        *(f"a-1-{name}.png" for name in ("downtime", "durations", "pages", "progress", "rounds")),
        "a-2-durations.png",
        "comparison.png",
    ]
    assert "no picture a-2-downtime: a-2: the guest did not move" in done.stderr


def test_a_record_of_one_side_only_has_no_picture_of_the_other(tmp_path: Path) -> None:
    (there,) = read_records([write(tmp_path / "a.jsonl", destination())])
    with pytest.raises(BadRecord, match="the source's side was not recorded"):
        draw_rounds(there)
    draw_durations(there)
