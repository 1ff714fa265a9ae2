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
#: A stream without a page is refused. In an image a page that is not there is zero, as the guest will notice.
DROP_A_PAGE = """
from kvmmig.image import Builder
from kvmmig.machine.pageset import Batch, PageSet
batches, write = PageSet.batches, Builder.write
def without_the_last_page(self, limit, scattered=None):
    for batch in batches(self, limit, scattered):
        yield Batch(batch.first, batch.stop, batch.pages[batch.pages != self.n_pages - 1])
def not_written(self, first, wanted, zero):
    wanted[self.layout.n_pages - 1 - first:] = False
    return write(self, first, wanted, zero)
PageSet.batches, Builder.write = without_the_last_page, not_written
"""
#: What changed while it was sent comes without its first page: the destination can't know, the guest can.
KEEP_AN_OLD_PAGE = """
from kvmmig.image import Builder
from kvmmig.machine.pageset import Batch, PageSet
batches, write = PageSet.batches, Builder.write
def without_a_changed_page(self, *limits):
    changed = len(self) < self.n_pages // 2
    for batch in batches(self, *limits):
        yield Batch(batch.first, batch.stop, batch.pages[1:]) if changed else batch
def not_written(self, first, wanted, zero):
    if not wanted.all():
        wanted[wanted.argmax()] = False
    return write(self, first, wanted, zero)
PageSet.batches, Builder.write = without_a_changed_page, not_written
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
        (DROP_A_PAGE, ["never came", "never came", "on arrival: vcpu 0"]),
        (KEEP_AN_OLD_PAGE, ["on arrival: vcpu 0"] * 3),
    ],
    ids=["a dropped page", "an old page"],
)
def test_a_broken_source_makes_it_fail_and_say_what(
    kvmmig: Kvmmig, tmp_path: Path, nothing_left: Callable[[], None], breakage: str, says: list[str]
) -> None:
    wrapper = tmp_path / "broken.py"
    wrapper.write_text(HEAD + breakage + TAIL)
    told = kvmmig(*DEMO, wrapper=wrapper)
    assert told.process.returncode == 1, told
    failures = [line for line in told.stdout.splitlines() if ": FAILED: " in line]
    assert [line.split(":")[0] for line in failures] == ["tcp", "pipe + helper", "file"]
    assert all(words in line for words, line in zip(says, failures, strict=True)), told
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
