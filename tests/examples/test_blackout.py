"""The example that reproduces the blackout shows every way of saving, and what was saved is right.

How long things took is for people to read: nothing here asserts on time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "blackout.py"
WAYS = ["pipe a", "pipe b", "pipe c", "pipe k", "file a", "file b", "file k"]


def command(directory: Path, *options: str) -> list[str]:
    return [sys.executable, str(EXAMPLE), "--memory", "8MiB", "--directory", str(directory), *options]


def run(directory: Path, *options: str) -> str:
    done = subprocess.run(
        command(directory, *options), capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def cells(line: str) -> list[str]:
    return [
        cell.strip() for cell in line.replace("┃", "│").strip().removeprefix("│").removesuffix("│").split("│")
    ]


def alive(directory: Path) -> list[str]:
    """The command lines of processes that have to do with ``directory``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(directory) in words:
            found.append(words)
    return found


@pytest.mark.kvm
def test_every_way_is_shown_with_its_histograms_idle_and_under_load_and_what_it_saved_is_right(
    tmp_path: Path,
) -> None:
    printed = run(tmp_path, "--load")
    for situation in ("no load of its own", "CPU and disk load"):
        assert f"8MiB, {os.cpu_count()} CPUs, {situation}" in printed
        for title in ("steps", "turns of the loop"):
            histogram = printed[printed.index(f"{title}, {situation}") :].splitlines()
            assert cells(histogram[2])[1:] == WAYS
            rows = [cells(line)[1:] for line in histogram[4:12]]
            counts = [sum(int(row[way].split()[1]) for row in rows if row[way]) for way in range(len(WAYS))]
            assert all(counts), counts
            if title == "steps":
                assert counts == steps_of(printed, situation)
    restored = re.findall(r"restored from (.*): dirtier: all (\d+) pages are right", printed)
    assert restored == [(way, str((8 - 2) * 256)) for way in WAYS if way[-1] in "bk"]
    assert list(tmp_path.iterdir()) == []
    assert alive(tmp_path) == []


def steps_of(printed: str, situation: str) -> list[int]:
    """The numbers of steps that the table of a situation tells."""
    lines = printed[printed.index(f"CPUs, {situation}") :].splitlines()[4 : 4 + len(WAYS)]
    table = {cells(line)[0].partition(":")[0]: int(cells(line)[1]) for line in lines}
    assert list(table) == WAYS
    return list(table.values())


@pytest.mark.kvm
def test_the_sweep_shows_the_unbounded_step_with_ever_larger_writes(tmp_path: Path) -> None:
    printed = run(tmp_path, "--sweep")
    assert re.findall(r"pipe a: pages a write: (\d+)", printed) == ["1", "2", "4", "8", "16", "64", "1024"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kvm
def test_ctrl_c_leaves_neither_files_nor_processes(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "--load"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("turns of the loop"):  # the load is next
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert said == "stopped; nothing is left behind\n"
    assert process.returncode == 1
    assert list(tmp_path.iterdir()) == []
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--memory", "much"], "'much' is not a size"),
        (["--pages", "0"], "a write can't carry 0 pages"),
        (["--directory", "/nowhere"], "No such file"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path: Path, options: list[str], sentence: str) -> None:
    done = subprocess.run(
        command(tmp_path, *options), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
