"""Each input of the table is answered as QEMU answers it, or the table and docs/monitor.md say why not."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmmig.qmp import QMPServer
from tests.monitor.as_qemu.inputs import SCENES, Scene
from tests.monitor.as_qemu.record import answers, read_table, record, version_of
from tests.monitor.lab import PATIENCE, awaiting, running

_BINARY = os.environ.get("QEMU") or shutil.which("qemu-system-x86_64")
_DOCUMENT = Path(__file__).parents[3] / "docs" / "monitor.md"
_REASONS = re.compile(r"## Where it answers otherwise than QEMU(.*?)(?:\n## |\Z)", re.DOTALL)
Messages = list[dict[str, Any]]


def same(ours: Messages, theirs: Messages) -> bool:
    """Whether they mean the same to a program. A sentence of ours may go on behind theirs."""
    return len(ours) == len(theirs) and all(map(_same_message, ours, theirs))


def _same_message(our: dict[str, Any], their: dict[str, Any]) -> bool:
    if "error" in our and "error" in their:
        mine, its = our["error"], their["error"]
        goes_on = mine["desc"].startswith(its["desc"]) and mine["class"] == its["class"]
        return goes_on and our.get("id") == their.get("id")
    return our == their


def _rows(scene: Scene) -> list[dict[str, Any]]:
    return [row for row in read_table()[1] if row["scene"] == scene.name]


@pytest.mark.kvm
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
async def test_it_answers_as_the_table_says(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with trio.fail_after(PATIENCE):
        async with running() if scene.machine == "running" else awaiting("the-dirtier") as lab:
            server = QMPServer(lab.table, version="kvmmig 0.1.0")
            lab.control.subscribe(server.emit)
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, f"unix:{path}")
                said = await trio.to_thread.run_sync(answers, scene, path)
                nursery.cancel_scope.cancel()
    for row, ours in zip(_rows(scene), said, strict=True):
        if "why" not in row:
            assert same(ours, row["qemu"]), row["input"]
        else:
            assert not same(ours, row["qemu"]), f"no difference any more: {row['input']}"
            kinds = [sorted(set(message) - {"id"}) for message in row["qemu"]]
            assert same(ours, row["kvmmig"]) if "kvmmig" in row else kinds == [sorted(one) for one in ours], (
                row
            )


def test_the_table_has_all_inputs() -> None:
    rows = [(row["scene"], row["input"]) for row in read_table()[1]]
    assert rows == [(scene.name, text) for scene in SCENES for text in scene.inputs]


def test_each_reason_is_in_the_docs_and_each_one_there_is_of_a_row() -> None:
    section = _REASONS.search(_DOCUMENT.read_text())
    assert section is not None
    written = re.findall(r"^- \*\*(.*?)\.?\*\*", section[1], re.MULTILINE)
    version, rows = read_table()
    assert {row["why"] for row in rows if "why" in row} == set(written)
    alike = sum("why" not in row for row in rows)
    assert f"has {len(rows)} inputs and what QEMU {version} answers to each. To {alike} " in section[1]


@pytest.mark.slow  # it waits for another program, on a host that may be busy
@pytest.mark.skipif(_BINARY is None, reason="there is no qemu-system-x86_64 here; QEMU=PATH names one")
def test_qemu_answers_as_it_was_recorded() -> None:
    assert _BINARY is not None
    version, rows = read_table()
    if (installed := version_of(_BINARY)) != version:
        pytest.skip(f"the table is of QEMU {version}, and here is {installed}")
    for row, again in zip(rows, record(_BINARY), strict=True):
        assert again["qemu"] == row["qemu"], row["input"]
