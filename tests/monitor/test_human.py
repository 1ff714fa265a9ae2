"""What people type at QEMU's other monitor; `as_qemu` has what QEMU says to the same lines."""

from __future__ import annotations

import pytest
import trio

from kvmmig.monitor.control import MachineControl
from tests.monitor.lab import PATIENCE, Lab, awaiting, listening, running


async def said(lab: Lab, line: str) -> str:
    return str(await lab("human-monitor-command", command_line=line))


@pytest.mark.kvm
async def test_a_migration_is_begun_and_watched_by_lines() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            assert await said(here, "info migrate") == ""
            uri = await listening(there)
            assert "continuing detached" in await said(here, f"migrate {uri}"), "it is never waited for"
            await here.until_status("completed")
            lines = (await said(here, "info migrate")).split("\r\n")
            assert lines[0] == "Migration status: completed"
            figures = dict(line.split(": ") for line in lines[1:-1])
            assert {"total time", "downtime", "setup", "transferred ram", "throughput"} <= set(figures)
            assert (figures["total ram"], figures["page size"]) == ("16384 kbytes", "4 kbytes")
            assert await said(here, "info status") == "VM status: paused (postmigrate)\r\n"
            assert (await said(here, "cont")).startswith("Error: ")


@pytest.mark.parametrize(
    ("line", "parameter", "value"),
    [
        ("migrate_set_speed 32", "max-bandwidth", 32 << 20),
        ("migrate_set_speed 1g", "max-bandwidth", 1 << 30),
        ("migrate_set_speed 0", "max-bandwidth", 0),
        ("migrate_set_downtime 0.1", "downtime-limit", 100),
        ("migrate_set_downtime 50ms", "downtime-limit", 50),
        ("migrate_set_parameter downtime-limit 70", "downtime-limit", 70),
        ("migrate_set_parameter max-bandwidth 7M", "max-bandwidth", 7 << 20),
    ],
)
async def test_speed_and_downtime_are_in_the_units_of_people(line: str, parameter: str, value: int) -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        assert await said(lab, line) == ""
        assert (await lab("query-migrate-parameters"))[parameter] == value


@pytest.mark.parametrize(
    "line",
    [
        "migrate_set_speed fast",
        "migrate_set_downtime -1",
        "migrate_set_downtime 3000s",
        "migrate_set_downtime",
    ],
)
async def test_what_is_no_number_is_a_sentence_and_changes_nothing(line: str) -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        before = await lab("query-migrate-parameters")
        assert await said(lab, line)
        assert await lab("query-migrate-parameters") == before


async def test_help_has_a_line_for_each_command() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        lines = (await said(lab, "help")).splitlines()
        assert {"info status", "migrate [-d] string", "stop|s"} <= {
            line.partition(" -- ")[0].split(" (")[0] for line in lines
        }
        assert await said(lab, "help stop") == "stop|s -- stop emulation\r\n"
        assert await said(lab, "info") == "".join(f"{line}\r\n" for line in lines if line.startswith("info "))
