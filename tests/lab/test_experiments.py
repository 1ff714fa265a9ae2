"""Experiments: the grid, its rows that survive their runner, and the pictures of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from kvmmig.cli.app import cli
from kvmmig.errors import KvmmigError
from kvmmig.lab.experiments import runner
from kvmmig.lab.experiments.drawing import draw_plot, draw_spec
from kvmmig.lab.experiments.intervals import mean_and_half_width
from kvmmig.lab.experiments.model import predict
from kvmmig.lab.experiments.results import Results, read_rows
from kvmmig.lab.experiments.spec import BadSpec, Spec, Trial, read_spec, trials_of
from kvmmig.lab.experiments.trial import Task, run_trial
from kvmmig.lab.records import read_records

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "examples/experiments").glob("*.toml"))
SMALL = """
name = "small"
repeats = 2
[guest]
memory = "8MiB"
warm-up = "0ms"
settings.hot = ["1MiB", "2MiB"]
[migration]
to = "exec:cat > /dev/null"
[[plot]]
name = "total"
x = "set.hot"
y = "total_time"
model = "geometric"
"""


def small(tmp_path: Path, text: str = SMALL) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_that_is_shipped_is_right_and_draws_what_a_result_has(path: Path) -> None:
    spec = read_spec(path)
    assert spec.name == path.stem
    rows = [made_up(trial) for trial in trials_of(spec)]
    assert spec.plot
    for plot in spec.plot:
        (axes,) = draw_plot(spec, plot, rows).axes
        assert axes.containers or axes.lines


def made_up(trial: Trial) -> dict[str, Any]:
    return {
        **trial.parameters,
        "trial": trial.key,
        "outcome": "done",
        "memory_bytes": 128 << 20,
        **dict.fromkeys(("total_time", "downtime", "setup_time", "cancel_latency"), 0.5 + trial.repeat),
        **dict.fromkeys(("monitor_worst", "bare_loop_worst"), 0.01),
        "rate": 1e8,
        "dirty_rate": 5e7,
        "sent_share": 1.2,
        "sent_bytes": 1e8,
    }


def test_the_grid_has_every_combination_once_a_repeat_and_a_key_of_its_own(tmp_path: Path) -> None:
    spec = read_spec(small(tmp_path))
    trials = trials_of(spec)
    assert [(trial.parameters["set.hot"], trial.repeat) for trial in trials] == [
        ("1MiB", 0),
        ("2MiB", 0),
        ("1MiB", 1),
        ("2MiB", 1),
    ]
    assert len({trial.key for trial in trials}) == 4
    assert spec.varied == ["set.hot"]


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ("repeats = 2", "repeats = 0", r"Expected `int` >= 1 - at `\$\.repeats`"),
        ('memory = "8MiB"', 'memory = "8"', "memory: "),
        ('memory = "8MiB"', 'memry = "8MiB"', r"unknown field `memry` - at `\$\.guest`"),
        ('to = "exec:', 'to = "exek:', "to: .*exek"),
        ('warm-up = "0ms"', 'warm-up = "5"', "warm-up: '5' has no unit"),
        ("[migration]", '[migration]\npolicy = "never"', "policy: there is no policy 'never'"),
        ("[guest]", "[guest", "is no TOML"),
    ],
)
def test_a_spec_that_cannot_be_is_a_sentence(wrong: str, right: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=f"small.toml.*{sentence}"):
        read_spec(small(tmp_path, SMALL.replace(wrong, right)))


def test_rows_survive_a_torn_line_and_the_newest_one_of_a_trial_counts(tmp_path: Path) -> None:
    one, other = trials_of(read_spec(small(tmp_path)))[:2]
    with Results.open(tmp_path / "out") as results:
        results.add(one, {"outcome": "done", "starved": True})
        results.add(other, {"outcome": "done"})
    with (tmp_path / "out/results.jsonl").open("ab") as file:
        file.write(b'{"trial":"torn')
    with Results.open(tmp_path / "out") as results:
        assert len(results.rows) == 2
        results.forget(lambda row: bool(row.get("starved")))
        assert results.row_of(one) is None
        results.add(one, {"outcome": "failed"})
        with pytest.raises(KvmmigError, match="another run"), Results.open(tmp_path / "out"):
            pass
    assert {row["trial"]: row["outcome"] for row in read_rows(tmp_path / "out")} == {
        one.key: "failed",
        other.key: "done",
    }


async def test_a_trial_that_crashes_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def run_process(task: Task, *rest: object) -> dict[str, Any]:
        asked.append(str(task.parameters["set.hot"]))
        return {"outcome": "crashed", "error": "status -9: "} if len(asked) == 1 else {"outcome": "done"}

    monkeypatch.setattr(runner, "_run_process", run_process)
    trials = trials_of(read_spec(small(tmp_path)))
    with Results.open(tmp_path / "out") as results:
        told: list[tuple[int, int]] = []
        await runner.run_experiment(
            trials, results, lambda done, count, left, row: told.append((done, count))
        )
        await runner.run_experiment(trials, results, lambda *news: None)
        assert [row["outcome"] for row in results.rows] == ["crashed", "done", "done", "done"]
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert len(asked) == 4
        tables = results.write_tables()
    assert tables[0].read_text().splitlines()[0].startswith("trial,repeat,outcome")


@pytest.mark.kvm
async def test_a_trial_in_this_process_has_figures_a_record_and_a_cancel_its_latency(tmp_path: Path) -> None:
    (trial, *_) = trials_of(read_spec(small(tmp_path)))

    def task(**changes: str | int) -> Task:
        return Task({**trial.parameters, **changes}, 0, str(tmp_path), str(tmp_path / "a.jsonl"), "")

    with trio.fail_after(60):
        row = await run_trial(task())
    assert (row["outcome"], row["error"]) == ("done", "")
    assert row["sent_bytes"] > 1 << 20
    assert 0 <= row["withheld"] <= 1
    assert read_records([tmp_path / "a.jsonl"])[0].sent().ended is not None
    with trio.fail_after(60):
        row = await run_trial(task(**{"cancel-after": "50ms", "bandwidth": "1MB/s"}))
    assert row["outcome"] == "cancelled"
    assert 0 < row["cancel_latency"] < 60


@pytest.mark.kvm
@pytest.mark.slow
def test_a_killed_runner_loses_no_trial_and_tries_none_twice(tmp_path: Path) -> None:
    """Real processes: the runner is killed when it has one row, and what it had is not tried again."""
    spec, out = small(tmp_path, SMALL.replace("repeats = 2", "repeats = 1")), tmp_path / "out"
    command = [sys.executable, "-m", "kvmmig", "experiment", "run", str(spec), "--out", str(out)]
    results = out / "results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not (results.exists() and results.read_bytes().count(b"\n") == 1):
            assert process.poll() is None
            assert time.monotonic() < deadline
            os.sched_yield()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    (first,) = read_rows(out)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "2 of 2 trials, 0 failed" in done.stdout
    lines = results.read_text().splitlines()
    assert len(lines) == 2
    assert read_rows(out)[0] == first
    assert {"monitor_worst", "bare_loop_worst"} <= read_rows(out)[1].keys()
    assert draw_spec(read_spec(spec), read_rows(out), out, "svg") == [out / "total.svg"]


def test_a_picture_without_results_and_one_of_what_is_not_there_are_sentences(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["experiment", "plot", str(small(tmp_path)), "--out", str(tmp_path)])
    assert "run the experiment first" in str(done.exception)
    spec: Spec = read_spec(small(tmp_path, SMALL.replace("total_time", "totl_time")))
    rows = [made_up(trial) for trial in trials_of(spec)]
    with pytest.raises(BadSpec, match="no result has 'totl_time'; there are"):
        draw_plot(spec, spec.plot[0], rows)


def test_the_intervals_are_students() -> None:
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
    assert mean_and_half_width([5.0]) == (5.0, 0.0)


def test_the_model_is_a_geometric_series_until_the_knee() -> None:
    def model(dirty_rate: float) -> tuple[float, float]:
        predicted = predict(memory=1e9, working_set=1e9, rate=1e8, dirty_rate=dirty_rate, downtime_limit=0.1)
        return predicted.total_time, predicted.downtime

    assert model(0.0) == (10.0, 0.0)
    total, downtime = model(5e7)
    assert downtime == pytest.approx(10 / 2**7)
    assert total == pytest.approx(10 * (2 - 1 / 2**7))
    assert model(2e8)[1] == pytest.approx(10.0), "the working set, at the link's rate"
