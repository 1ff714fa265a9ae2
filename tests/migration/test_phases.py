"""The phases: one table, which the code runs on and the docs draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmmig.migration.phases import PHASES, Phase, may_follow
from kvmmig.monitor.states import status_of

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def drawn() -> str:
    lines = [
        "| phase | what is done | the guest is | a cancel leads to | an error leads to |",
        "|---|---|---|---|---|",
    ]
    for phase, row in PHASES.items():
        cells = (row.on_cancel or "refused", row.on_error or "") if not row.is_end else ("", "")
        lines.append(
            f"| {phase} | {row.what} | {row.guest} | {cells[0]} | {cells[1]} |".replace("|  |", "| |")
        )
    return "\n".join(line.replace("|  |", "| |") for line in lines)


def test_the_docs_draw_the_table_that_the_code_runs_on() -> None:
    assert drawn() in PAGE.read_text()


def test_every_phase_has_a_row_and_leads_to_an_end() -> None:
    assert set(PHASES) == set(Phase)
    reached, todo = {Phase.SETUP}, [Phase.SETUP]
    while todo:
        phase = todo.pop()
        for following in Phase:
            if may_follow(phase, following) and following not in reached:
                reached.add(following)
                todo.append(following)
    assert reached == set(Phase)


@pytest.mark.parametrize("phase", list(Phase))
def test_who_has_the_guest_decides_what_a_fault_leads_to(phase: Phase) -> None:
    row = PHASES[phase]
    if row.is_end:
        return
    is_ours = row.guest.startswith("the source's")
    assert (row.on_cancel is Phase.CANCELLED) == is_ours
    assert row.on_error is (Phase.FAILED if is_ours else Phase.UNKNOWN)


@pytest.mark.parametrize("phase", list(Phase))
def test_every_phase_has_a_status_that_qemu_s_clients_know(phase: Phase) -> None:
    assert status_of(phase)
