"""The machine's commands, with QEMU's names, arguments and replies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

import kvmmig
from kvmmig.errors import WrongState
from kvmmig.monitor.commands import commands_for
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.events import EVENTS
from kvmmig.qmp import QMPError
from tests.monitor.lab import MIB, PATIENCE, Lab, awaiting, check, running


async def test_before_there_is_a_guest_every_command_has_an_answer() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        assert await lab("query-name") == {"name": "a"}
        assert await lab("query-status") == {"status": "prelaunch", "running": False}
        assert await lab("query-kvm") == {"enabled": True, "present": True}
        assert await lab("query-cpus-fast") == []
        assert await lab("query-memory-size-summary") == {"base-memory": 0, "plugged-memory": 0}
        assert (await lab("query-version"))["package"] == f"kvmmig {kvmmig.__version__}"
        assert await lab("query-migrate") == {}
        assert (await lab("query-dirty-rate"))["status"] == "unstarted"
        assert await lab("x-kvmmig-query-migration") == {}
        assert await lab("x-kvmmig-query-knobs") == []
        assert await lab("x-kvmmig-query-machine") == {
            "name": "a",
            "pid": os.getpid(),
            "version": kvmmig.__version__,
            "status": "prelaunch",
        }
        for command in ("stop", "cont", "system_reset", "x-kvmmig-take-back"):
            with pytest.raises(WrongState, match="no guest yet"):
                await lab(command)
        with pytest.raises(WrongState, match="no guest yet"):
            await lab("migrate", uri="tcp:127.0.0.1:1")
        with pytest.raises(QMPError, match="no guest can arrive here"):
            await lab("migrate-incoming", uri="tcp:127.0.0.1:0")
        with pytest.raises(QMPError, match="no page map"):
            await lab("x-kvmmig-query-page-map")
        with pytest.raises(QMPError, match="no knob"):
            await lab("x-kvmmig-set-knob", name="throttle.rate", value="1MB/s")
        assert await lab("migrate_cancel") == {}
        await lab("quit")
        assert (await control.wait()).ending is None


def test_all_commands_of_a_machine_are_there() -> None:
    async def names() -> list[str]:
        async with MachineControl.open(name="a") as control:
            return commands_for(control).names()

    own = "machine migration page-map policies knobs"
    assert set(trio.run(names)) == {
        *("query-version", "query-name", "query-status", "query-kvm", "query-cpus-fast", "stop", "cont"),
        *("query-memory-size-summary", "quit", "system_reset", "calc-dirty-rate", "query-dirty-rate"),
        *("migrate", "migrate-incoming", "migrate_cancel", "migrate-continue", "query-migrate"),
        *("migrate-set-parameters", "query-migrate-parameters"),
        *("migrate-set-capabilities", "query-migrate-capabilities"),
        *(f"x-kvmmig-query-{name}" for name in own.split()),
        *("x-kvmmig-set-policy", "x-kvmmig-set-knob", "x-kvmmig-take-back"),
        *("query-uuid", "query-block", "query-chardev", "query-qmp-schema", "system_powerdown"),
        *("set-action", "x-exit-preconfig", "human-monitor-command"),
    }


async def test_the_page_about_the_monitor_names_all_that_it_has() -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text()
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        for name in (
            *lab.table.names(),
            *await lab("query-migrate-parameters"),
            *(one["capability"] for one in await lab("query-migrate-capabilities")),
            *(one["policy"] for one in await lab("x-kvmmig-query-policies")),
        ):
            assert f"`{name}" in page, name


@pytest.mark.kvm
async def test_a_running_machine_describes_itself() -> None:
    with trio.fail_after(PATIENCE):
        async with running(cpus=2) as lab:
            assert await lab("query-status") == {"status": "running", "running": True}
            cpus = await lab("query-cpus-fast")
            assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
            assert {cpu["target"] for cpu in cpus} == {"x86_64"}
            tasks = {int(task) for task in os.listdir("/proc/self/task")}
            assert {cpu["thread-id"] for cpu in cpus} <= tasks, "its threads, as top -H shows them"
            assert (await lab("query-memory-size-summary"))["base-memory"] == 16 * MIB
            described = await lab("x-kvmmig-query-machine")
            assert (described["guest"], described["cpus"], described["memory"]) == ("dirtier", 2, 16 * MIB)
            assert described["parameters"]["hot"] == MIB


@pytest.mark.kvm
async def test_stop_cont_and_reset() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as lab:
            await lab("stop")
            assert await lab("query-status") == {"status": "paused", "running": False}
            await lab("system_reset")
            assert (await lab("query-status"))["status"] == "paused"
            await lab("cont")
            assert (await lab("query-status"))["running"]
            assert lab.named == ["RESUME", "STOP", "RESET", "RESUME"]
            await lab("system_reset")
            await check(lab.control)


@pytest.mark.kvm
async def test_the_dirty_rate_is_measured_beside_a_running_guest() -> None:
    with trio.fail_after(PATIENCE):
        async with running(size=32 * MIB, hot="8MiB") as lab:
            await lab("calc-dirty-rate", calc_time=300, calc_time_unit="millisecond")
            assert (await lab("query-dirty-rate"))["status"] == "measuring"
            with pytest.raises(WrongState, match="already being measured"):
                await lab("calc-dirty-rate", calc_time=1)
            await lab.until(lambda: lab.control.dirty_rate.status == "measured")
            measured = await lab("query-dirty-rate", calc_time_unit="millisecond")
            assert measured["calc-time"] == 300
            assert measured["mode"] == "dirty-bitmap"
            # Each page that it writes in that time counts once, and on a busy host it writes but a few.
            assert 0 < measured["x-kvmmig-dirty-rate-bytes"] < 33 * MIB / 0.3
            await lab("stop")
            await lab("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond", mode="dirty-bitmap")
            await lab.until(lambda: lab.control.dirty_rate.status == "measured")
            assert (await lab("query-dirty-rate"))["dirty-rate"] == 0, "a paused guest writes nothing"
            await lab("cont")
            await check(lab.control)


@pytest.mark.kvm
async def test_the_dirty_rate_is_estimated_from_a_sample_of_the_pages() -> None:
    with trio.fail_after(PATIENCE):
        async with running(size=32 * MIB, hot="24MiB") as lab:
            await lab("calc-dirty-rate", calc_time=200, calc_time_unit="millisecond", sample_pages=16384)
            await lab.until(lambda: lab.control.dirty_rate.status == "measured")
            measured = await lab("query-dirty-rate")
            assert (measured["mode"], measured["sample-pages"]) == ("page-sampling", 16384)
            assert 0 < measured["x-kvmmig-dirty-rate-bytes"] < 33 * MIB / 0.2
            await lab("stop")
            await lab("calc-dirty-rate", calc_time=50, calc_time_unit="millisecond", mode="page-sampling")
            await lab.until(lambda: lab.control.dirty_rate.status == "measured")
            measured = await lab("query-dirty-rate")
            assert (measured["dirty-rate"], measured["sample-pages"]) == (0, 512)


async def test_the_schema_says_what_there_is_and_what_each_command_takes() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        schema = await lab("query-qmp-schema")
        described = {one["name"]: one for one in schema}
        assert len(described) == len(schema), "no name twice"
        kinds = {
            kind: [one["name"] for one in schema if one["meta-type"] == kind] for kind in ("command", "event")
        }
        assert kinds == {"command": lab.table.names(), "event": sorted(EVENTS)}
        for one in schema:  # each type that is named is described
            used = [one[key] for key in ("arg-type", "ret-type", "element-type") if key in one]
            used += [member["type"] for member in one.get("members", []) if one["meta-type"] != "enum"]
            assert set(used) <= set(described), one
        members = described[described["calc-dirty-rate"]["arg-type"]]["members"]
        by_name = {member["name"]: member for member in members}
        assert by_name["calc-time"] == {"name": "calc-time", "type": "int"}, "it may not be missing"
        assert by_name["sample-pages"] == {"name": "sample-pages", "type": "int", "default": None}
        assert set(described[by_name["mode"]["type"]]["values"]) == {
            "dirty-bitmap",
            "dirty-ring",
            "page-sampling",
        }
        assert described["stop"]["ret-type"] == described["stop"]["arg-type"], (
            "nothing goes in, nothing comes out"
        )
        assert described["query-status"]["ret-type"] == "any"


@pytest.mark.kvm
async def test_a_migration_ends_a_measurement_and_loses_nothing(tmp_path: object) -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await here("calc-dirty-rate", calc_time=60)
            await there("migrate-incoming", uri="tcp:127.0.0.1:0")
            await here("migrate", uri=str(there.control.incoming.uri))
            with pytest.raises(WrongState, match="needs the dirty log for itself"):
                await here("calc-dirty-rate", calc_time=1)
            await here.until_status("completed")
            assert (await here("query-dirty-rate"))["status"] == "unstarted"
            await there.control.incoming.wait()
            await check(there.control)


@pytest.mark.kvm
async def test_a_measurement_that_makes_no_sense_is_refused() -> None:
    async with running() as lab:
        for given in ({"calc_time": 61}, {"calc_time": 1, "mode": "dirty-ring"}, {"calc_time": -1}):
            with pytest.raises(QMPError):
                await lab("calc-dirty-rate", **given)
        assert (await lab("query-dirty-rate"))["status"] == "unstarted"
