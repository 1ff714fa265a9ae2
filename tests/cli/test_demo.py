"""The demo tells the truth: verified where all is well, and a clear failure where one page is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.cli import demo
from kvmmig.errors import BadConfig

from .conftest import Kvmmig

DEMO = ("demo", "--memory", "128MiB", "--directory", ".")

# Each breaks the source's side once a migration, and then runs the command line as it is.
HEAD = """
import sys
from kvmmig.cli import main
from kvmmig import stream
from kvmmig.stream.cursor import Cursor
"""
TAIL = "\nsys.exit(main())\n"
DROP_A_PAGE = """
from kvmmig.machine.pageset import Batch, PageSet
batches = PageSet.batches
def without_the_last_page(self, limit, scattered=None):
    for batch in batches(self, limit, scattered):
        yield Batch(batch.first, batch.stop, batch.pages[batch.pages != self.n_pages - 1])
PageSet.batches = without_the_last_page
"""
REPEAT_A_FRAME = """
page_runs = stream.Encoder.page_runs
def twice(self, runs, data, known):
    frame = page_runs(self, runs, data, known)
    return [*frame, *frame]
stream.Encoder.page_runs = twice
"""


@pytest.mark.kvm
def test_every_move_is_verified(kvmmig: Kvmmig, nothing_left: Callable[[], None], tmp_path: Path) -> None:
    told = kvmmig(*DEMO)
    assert told.process.returncode == 0, told
    rows = [line for line in told.stdout.splitlines() if "│" in line and "verified" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["tcp", "pipe + helper", "file"]
    for row in rows:
        assert f" {(128 - 2) * 256} " in row  # all pages from 2 MiB up
    assert "FAILED" not in told.stdout
    nothing_left()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("breakage", "says"),
    [
        (DROP_A_PAGE, "on arrival: vcpu 0"),
        (REPEAT_A_FRAME, "frame"),
    ],
    ids=["a dropped page", "a repeated frame"],
)
def test_a_broken_source_makes_it_fail_and_say_what(
    kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None], breakage: str, says: str
) -> None:
    wrapper = tmp_path / "broken.py"
    wrapper.write_text(HEAD + breakage + TAIL)
    told = kvmmig(*DEMO, wrapper=wrapper)
    assert told.process.returncode == 1, told
    failures = [line for line in told.stdout.splitlines() if ": FAILED: " in line]
    assert [line.split(":")[0] for line in failures] == ["tcp", "pipe + helper", "file"]
    assert all(says in line for line in failures), told
    nothing_left()
    assert list(tmp_path.iterdir()) == [wrapper]


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_it_refuses_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str
) -> None:
    if lacking == "memory":
        monkeypatch.setattr(demo, "available_memory", lambda: 1 << 30)
    else:
        monkeypatch.setattr(demo, "free_space", lambda directory: 1 << 30)
    with pytest.raises(BadConfig, match=f"the demo needs .* of {lacking}.*use "):
        demo.run_demo(memory=1 << 30, directory=str(tmp_path), as_json=False)
