"""Records are read whole, both sides joined, and shown, exported and traced as what they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmmig.cli.app import cli
from kvmmig.lab.records import BadRecord, read_records
from kvmmig.lab.trace import ROWS, trace_of

from .example import begun, destination, ended, source, write


def test_lines_of_both_sides_among_each_other_are_told_apart(tmp_path: Path) -> None:
    (migration,) = read_records([write(tmp_path / "a.jsonl", source(), destination())])
    assert migration.name == "a"
    assert migration.one_clock
    assert migration.source is not None
    assert list(migration.source.events) == sorted(source(), key=lambda event: event.at)
    assert migration.destination is not None
    assert [type(event) for event in migration.destination.events] == [type(event) for event in destination()]
    assert len(migration.others) == 1


def test_two_files_with_a_side_each_are_one_migration(tmp_path: Path) -> None:
    here = write(tmp_path / "here.jsonl", source())
    there = write(tmp_path / "there.jsonl", destination(clock="another"))
    (migration,) = read_records([there, here])
    assert len(migration.sides) == 2
    assert not migration.one_clock


def test_several_migrations_of_one_file_are_numbered_as_they_began(tmp_path: Path) -> None:
    later = [begun("source", 20.0, stream="f" * 32), ended(21.0)]
    names = [each.name for each in read_records([write(tmp_path / "a.jsonl", later, source())])]
    assert names == ["a-1", "a-2"]


def test_a_last_line_that_is_cut_off_is_passed_over_and_nonsense_has_its_line_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", source())
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (migration,) = read_records([path])
    assert migration.sent().ended is None
    path.write_bytes(whole + b"what is this?\n")
    with pytest.raises(BadRecord, match=r"a\.jsonl, line 23 is no event of a record"):
        read_records([path])


def test_a_missing_file_and_an_empty_one_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, sentence in (("none.jsonl", "No such file"), ("empty.jsonl", "no migration is recorded")):
        done = CliRunner().invoke(cli, ["record", "show", str(tmp_path / name)])
        assert sentence in str(done.exception)


def test_it_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", source(), destination())
    done = CliRunner().invoke(cli, ["record", "show", str(path)])
    assert "a: dirtier, 64 MiB" in done.output
    assert "source tcp:127.0.0.1:4444, on here (Linux 6.1" in done.output
    assert "final pass" in done.output
    assert "downtime 120" in done.output


def test_a_table_has_a_row_an_event_and_parquet_the_same_as_csv(tmp_path: Path) -> None:
    import polars

    path = write(tmp_path / "a.jsonl", source(), destination())
    out, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    done = CliRunner().invoke(
        cli, ["record", "export", str(path), "--csv", str(out), "--parquet", str(parquet)]
    )
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(source()) + len(destination())
    sent = sum(int(row["sent-bytes"]) for row in rows if row["event"] == "round")
    assert sent == 88 << 20
    frame = polars.read_parquet(parquet)
    assert frame.shape == (len(rows), len(rows[0]))
    assert frame.filter(polars.col("event") == "round")["sent-bytes"].sum() == sent
    assert CliRunner().invoke(cli, ["record", "export", str(path)]).exit_code == 2


def test_a_trace_keeps_the_format_and_its_slices_nest(tmp_path: Path) -> None:
    """The format: "Trace Event Format"; within a row, slices lie in each other or apart."""
    path, out = write(tmp_path / "a.jsonl", source(), destination()), tmp_path / "trace.json"
    done = CliRunner().invoke(cli, ["trace", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    trace = json.loads(out.read_text())
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in "MXiC"
        assert {"name", "pid", "tid"} <= event.keys()
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    assert {pid for pid, _ in rows} == {1, 2}
    for slices in rows.values():
        open_until: list[float] = []
        for start, end in sorted(slices, key=lambda each: (each[0], -each[1])):
            while open_until and start >= open_until[-1] - 1:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1
            open_until.append(end)


def test_both_sides_of_a_trace_share_their_clock_where_they_have_one(tmp_path: Path) -> None:
    def at(clock: str, name: str) -> float:
        path = write(tmp_path / f"{clock}.jsonl", source(), destination(clock))
        events = trace_of(read_records([path]))["traceEvents"]
        return next(float(event["ts"]) for event in events if event["name"] == name)

    assert at("one", "the guest runs here") == pytest.approx(1.617e6)
    assert at("another", "the guest runs here") == pytest.approx(1.567e6)
    assert len(set(ROWS)) == len(ROWS)
