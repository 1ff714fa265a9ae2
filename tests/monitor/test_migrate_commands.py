"""Migration by QMP commands: there and back, its figures, its settings while it runs, descriptors."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmmig.errors import BadURI, ConnectFailed, KvmmigError, WrongState
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import QMPError
from tests.monitor.lab import MIB, PATIENCE, Lab, awaiting, check, listening, pass_fd, running

# QEMU's MigrationRAMStats: a client may look for any of these.
RAM = {
    *("transferred", "remaining", "total", "duplicate", "normal", "normal-bytes", "dirty-pages-rate"),
    *("mbps", "dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes", "pages-per-second"),
    *("precopy-bytes", "downtime-bytes", "postcopy-bytes", "dirty-sync-missed-zero-copy"),
}


async def settings_of(lab: Lab) -> dict[str, Any]:
    return dict(await lab("query-migrate-parameters"))


# -- the settings, without a machine ----------------------------------------------------------------------


async def test_parameters_are_shown_and_set_by_qemus_names() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        assert await settings_of(lab) == {
            "max-bandwidth": 0,
            "downtime-limit": 300,
            "cpu-throttle-initial": 20,
            "cpu-throttle-increment": 10,
            "max-cpu-throttle": 99,
            "x-kvmmig-timeout": 0,
            "x-kvmmig-on-timeout": "cancel",
            "x-kvmmig-stall-timeout": 30000,
            "x-kvmmig-setup-timeout": 60000,
            "x-kvmmig-record": "",
            "x-kvmmig-page-digests": False,
        }
        await lab("migrate-set-parameters", downtime_limit=50, max_bandwidth=10**9)
        await lab("migrate-set-parameters", x_kvmmig_timeout=1000, x_kvmmig_on_timeout="force")
        changed = await settings_of(lab)
        assert (changed["downtime-limit"], changed["max-bandwidth"]) == (50, 10**9)
        assert (changed["x-kvmmig-timeout"], changed["x-kvmmig-on-timeout"]) == (1000, "force")
        assert changed["cpu-throttle-initial"] == 20


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"downtime-limit": 2_000_001}, "downtime_limit.*2000"),
        ({"max-bandwidth": "fast"}, "max-bandwidth.*uint64"),
        ({"cpu-throttle-initial": 50, "max-cpu-throttle": 40}, "range of cpu_throttle_initial"),
        ({"max-bandwidth": 1, "multifd-channels": 4}, "'multifd-channels' can only be 2, QEMU's default"),
        ({"tls-creds": "tls0", "downtime-limit": 1}, "'tls-creds' can only be \"\""),
        ({"x-kvmmig-stall-timeout": 0}, "x-kvmmig-stall-timeout' expects an integer in the range of 1"),
        ({"x-kvmmig-on-timeout": "panic"}, "panic"),
    ],
)
async def test_a_parameter_that_makes_no_sense_changes_nothing(
    given: dict[str, object], sentence: str
) -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        before = await settings_of(lab)
        with pytest.raises(QMPError, match=sentence):
            await lab("migrate-set-parameters", **given)
        assert await settings_of(lab) == before


async def test_capabilities_are_shown_and_set_and_an_unknown_one_is_answered_with_the_known() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)

        async def capabilities() -> dict[str, bool]:
            return {one["capability"]: one["state"] for one in await lab("query-migrate-capabilities")}

        before = {"events": False, "return-path": True, "pause-before-switchover": False}
        assert await capabilities() == {**before, "auto-converge": False}
        with pytest.raises(QMPError) as caught:
            await lab(
                "migrate-set-capabilities",
                capabilities=[
                    {"capability": "events", "state": True},
                    {"capability": "xbzrle", "state": True},
                ],
            )
        assert str(caught.value) == (
            "the capability 'xbzrle' can only be off: kvmmig has no such thing; there are events, "
            "return-path, pause-before-switchover, auto-converge"
        )
        assert not (await capabilities())["events"], "all of them, or none"
        await lab("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": False}])
        assert (await capabilities())["return-path"], "it is always used, whether asked for or not"
        await lab("migrate-set-capabilities", capabilities=[{"capability": "auto-converge", "state": True}])
        assert (await capabilities())["auto-converge"]


async def test_policies_are_listed_and_chosen_with_their_parameters() -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)

        async def policies() -> dict[str, dict[str, Any]]:
            return {one["policy"]: one for one in await lab("x-kvmmig-query-policies")}

        assert [name for name, one in (await policies()).items() if one["active"]] == ["combined"]
        await lab("x-kvmmig-set-policy", policy="no-progress", parameters={"patience": 5})
        chosen = (await policies())["no-progress"]
        assert chosen["active"]
        assert chosen["parameters"]["patience"]["value"] == 5
        assert chosen["parameters"]["shrink"]["value"] == 0.95
        for policy, parameters, sentence in (
            ("hope", {}, "there are combined, downtime-limit"),
            ("max-rounds", {"patience": 3}, "it has rounds"),
            ("max-rounds", {"rounds": 0}, "use a whole number of 1 to 1000000"),
            ("rate-adaptive", {"minimum": 9e9}, "not above its maximum"),
        ):
            with pytest.raises(QMPError, match=sentence):
                await lab("x-kvmmig-set-policy", policy=policy, parameters=parameters)
        assert (await policies())["no-progress"]["active"]


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({}, QMPError, "either 'uri' or 'channels'"),
        ({"uri": "tcp:127.0.0.1:0", "resume": True}, QMPError, "no paused migration"),
        ({"uri": "pigeon:coop"}, BadURI, "no transport is called 'pigeon'"),
        ({"uri": "tcp:nowhere"}, BadURI, "tcp:"),
        ({"uri": "fd:lost"}, QMPError, "'lost' has not been found; pass it with 'getfd' first"),
        ({"uri": "file:/tmp/x,offset=0x1000"}, QMPError, "leave the offset out"),
        ({"uri": "rdma:host:1"}, BadURI, "no transport is called 'rdma'"),
        ({"uri": "tcp:127.0.0.1:1", "blk": True}, QMPError, "blk"),
        ({"channels": []}, QMPError, "channels"),
        (
            {"channels": [{"channel-type": "cpr", "addr": {"transport": "file", "filename": "/tmp/x"}}]},
            QMPError,
            "one main channel",
        ),
        ({"uri": "file:/nonexistent/x"}, ConnectFailed, "Could not create '/nonexistent/x': No such file"),
        ({"uri": "throttle+file:/etc/passwd/x"}, ConnectFailed, "Not a directory"),
    ],
)
@pytest.mark.kvm
async def test_a_migration_to_nowhere_is_refused_at_once_and_is_none(
    given: dict[str, object], kind: type[KvmmigError], sentence: str
) -> None:
    async with running(size=4 * MIB, hot="64KiB") as lab:
        with pytest.raises(kind, match=sentence):
            await lab("migrate", **given)
        assert await lab("query-migrate") == {}


# -- migrations -------------------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_there_and_the_figures_of_it() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running(hot="64KiB") as here:
            await there("migrate-incoming", uri="tcp:127.0.0.1:0")
            waiting = await there("query-migrate")
            assert waiting["status"] == "setup"
            address = waiting["socket-address"][0]
            assert address["type"] == "inet"
            with pytest.raises(WrongState, match="waits for its guest at tcp:"):
                await there("migrate-incoming", uri="tcp:127.0.0.1:0")
            addr = {"transport": "socket", **address}
            await here("migrate", channels=[{"channel-type": "main", "addr": addr}])
            info = await here.until_status("completed")
            assert set(info["ram"]) == RAM
            ram = info["ram"]
            assert ram["remaining"] == 0
            assert ram["total"] == 16 * MIB
            assert ram["normal"] + ram["duplicate"] >= 4096
            assert ram["transferred"] > ram["normal-bytes"]
            assert ram["precopy-bytes"] + ram["downtime-bytes"] == ram["transferred"]
            assert ram["dirty-sync-count"] >= 2
            assert {"total-time", "setup-time", "downtime", "expected-downtime"} <= set(info)
            assert "error-desc" not in info
            await there.control.incoming.wait()
            info = await there("query-migrate")
            assert info["status"] == "completed"
            assert f"(user {os.geteuid()})" in info["x-kvmmig-peer"]
            assert await here("query-status") == {"status": "postmigrate", "running": False}
            with pytest.raises(QMPError, match="no guest can arrive"):
                await there("migrate-incoming", uri="tcp:127.0.0.1:0")
            with pytest.raises(WrongState, match="no program was loaded here"):
                await there("system_reset")
            figures = await here("x-kvmmig-query-migration")
            assert figures["status"] == "completed"
            assert figures["steps"]["count"] > 0
            assert figures["rounds"][0]["sent-pages"] > 0
            assert figures["worst-stall"] == figures["turns"]["worst"]
            assert any(event["what"] == "done" for event in figures["events"])
            await check(there.control)


@pytest.mark.kvm
async def test_settings_reach_the_migration_that_runs() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running(size=32 * MIB, hot="8MiB") as here:
            await here("migrate-set-parameters", max_bandwidth=1_000_000)
            await here("x-kvmmig-set-policy", policy="downtime-limit")
            await here("migrate", uri=await listening(there))
            await here.until_status("active")
            for capability in ("events", "auto-converge"):
                with pytest.raises(QMPError, match="There's a migration process in progress"):
                    await here(
                        "migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}]
                    )
            with pytest.raises(WrongState, match="There's a migration process in progress"):
                await here("migrate", uri="tcp:127.0.0.1:1")
            assert (await here("x-kvmmig-query-migration"))["bandwidth"] == 1_000_000
            await here("migrate-set-parameters", max_bandwidth=60_000_000, downtime_limit=0)
            assert (await here("x-kvmmig-query-migration"))["bandwidth"] == 60_000_000
            await here.until(lambda: len(here.control.outgoing.migration.statistics().rounds) > 3)  # type: ignore[union-attr]  # one runs
            assert (await here("query-migrate"))["status"] == "active", "no downtime is short enough"
            await here("migrate-set-parameters", downtime_limit=2000)
            await here.until_status("completed")


@pytest.mark.kvm
async def test_a_policy_that_is_chosen_in_the_middle_decides_from_then_on() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running(size=32 * MIB, hot="8MiB") as here:
            await here("migrate-set-parameters", downtime_limit=0, max_bandwidth=100_000_000)
            await here("x-kvmmig-set-policy", policy="max-rounds", parameters={"rounds": 1_000_000})
            await here("migrate", uri=await listening(there))
            await here.until(lambda: len(here.control.outgoing.migration.statistics().rounds) > 1)  # type: ignore[union-attr]  # one runs
            await here("x-kvmmig-set-policy", policy="max-rounds", parameters={"rounds": 1})
            await here.until_status("completed")


@pytest.mark.kvm
async def test_auto_converge_slows_the_guest_down_as_its_parameters_say() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running(size=16 * MIB, hot="8MiB") as here:
            await here(
                "migrate-set-capabilities", capabilities=[{"capability": "auto-converge", "state": True}]
            )
            await here(
                "migrate-set-parameters", downtime_limit=0, max_bandwidth=40_000_000, cpu_throttle_initial=60
            )
            await here("x-kvmmig-set-policy", policy="max-rounds", parameters={"rounds": 1000})
            await here("migrate", uri=await listening(there))
            await here.until(lambda: here.control.outgoing.migration.statistics().throttle)  # type: ignore[union-attr]  # one runs
            assert (await here("query-migrate"))["cpu-throttle-percentage"] == 60
            await here("migrate_cancel")
            await here.until_status("cancelled")
            assert (await here("query-migrate"))["cpu-throttle-percentage"] == 0
            await check(here.control)


@pytest.mark.kvm
async def test_a_migration_waits_before_the_switchover_until_it_is_told_to_continue() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            with pytest.raises(QMPError, match="not in expected state: none"):
                await here("migrate-continue", state="pre-switchover")
            await here(
                "migrate-set-capabilities",
                capabilities=[{"capability": "pause-before-switchover", "state": True}],
            )
            await here("migrate", uri=await listening(there))
            await here.until_status("pre-switchover")
            await here.until(lambda: here.control.run_state() == "finish-migrate")
            with pytest.raises(QMPError, match="not in expected state: pre-switchover"):
                await here("migrate-continue", state="device")
            page_map = await here("x-kvmmig-query-page-map", blocks=16)
            assert sum(page_map["pages"]) == 4096
            assert sum(page_map["sent"]) >= 4096
            await here("migrate-continue", state="pre-switchover")
            await here.until_status("completed")
            await there.control.incoming.wait()
            await check(there.control)


@pytest.mark.kvm
async def test_one_cancelled_onto_a_slow_sink_gives_the_guest_back_and_its_knobs_turn_meanwhile() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            uri = f"throttle+{await listening(there)}?throttle.rate=100kB/s"
            await here("migrate", uri=uri)
            await here.until_status("active")
            assert [one["name"] for one in await here("x-kvmmig-query-knobs")] == ["throttle.rate"]
            with pytest.raises(KvmmigError, match=r"there are throttle\.rate"):
                await here("x-kvmmig-set-knob", name="fault.what", value="cut")
            await here("x-kvmmig-set-knob", name="throttle.rate", value="200kB/s")
            assert (await here("x-kvmmig-query-knobs"))[0]["value"] == "200 kB/s"
            assert (await here("query-migrate"))["ram"]["remaining"] > 0
            await here("migrate_cancel")
            await here.until_status("cancelled")
            assert await here("query-status") == {"status": "running", "running": True}
            await check(here.control)


@pytest.mark.kvm
async def test_one_that_fails_says_why_and_a_limit_of_time_holds() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await here("migrate", uri="tcp:127.0.0.1:1")
            assert "nobody listens" in (await here.until_status("failed"))["error-desc"]
            await here("migrate-set-parameters", x_kvmmig_timeout=50)
            await here("migrate", uri=f"throttle+{await listening(there)}?throttle.rate=10kB/s")
            info = await here.until_status("failed")
            assert "took longer than 0.05 s" in info["error-desc"]
            await check(here.control)


@pytest.mark.kvm
async def test_a_stalled_sink_ends_the_migration_by_the_stall_timeout() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await here("migrate-set-parameters", x_kvmmig_stall_timeout=100)
            await here("migrate", uri=f"fault+{await listening(there)}?fault.what=stall&fault.at=1MiB")
            assert "accepted nothing for 0.1 s" in (await here.until_status("failed"))["error-desc"]
            assert (await here("query-status"))["running"]


@pytest.mark.kvm
async def test_a_guest_that_is_only_saved_goes_on_here_and_comes_back_from_its_image_too(
    tmp_path: Path,
) -> None:
    saved = tmp_path / "guest.img"
    with trio.fail_after(PATIENCE):
        async with running() as here:
            with pytest.raises(KvmmigError, match="stores nothing"):
                await here("migrate", uri="tcp:127.0.0.1:1", x_kvmmig_keep_running=True)
            await here("migrate", uri=f"file:{saved}", x_kvmmig_keep_running=True)
            await here.until_status("completed")
            assert here.control.run_state() == "running"
            await check(here.control)
        async with awaiting() as there:
            await listening(there, f"file:{saved}")
            await there.control.incoming.wait()
            await check(there.control)


# -- descriptors, and commands of the shell -----------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("back", ["file:{}", "exec:cat {}"])
async def test_a_guest_saved_through_a_descriptor_to_any_program_is_restored(
    tmp_path: Path, back: str
) -> None:
    """The story that this project comes from: a pipe, and a helper that writes what comes out of it."""
    saved = tmp_path / "guest.img"
    with trio.fail_after(PATIENCE):
        async with running() as here:
            with saved.open("wb") as file:
                reader, writer = os.pipe()
                helper = subprocess.Popen(["cat"], stdin=reader, stdout=file)  # noqa: ASYNC220 -- starts at once
                os.close(reader)
            pass_fd(here, "migstream", writer)
            os.close(writer)
            await here("migrate", uri="fd:migstream")
            assert here.session.fds == {}, "the migration has it now"
            await here.until_status("completed")
            assert await trio.to_thread.run_sync(helper.wait) == 0, "its input has ended"
        async with awaiting() as there:
            await listening(there, back.format(saved))
            await there.control.incoming.wait()
            assert there.control.run_state() == "running"
            await check(there.control)


@pytest.mark.kvm
async def test_a_descriptor_is_closed_whatever_becomes_of_the_migration() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as here:
            for cancelled in (True, False):
                reader, writer = os.pipe()
                pass_fd(here, "out", writer)
                os.close(writer)
                await here("migrate", uri="fd:out")
                if cancelled:
                    await here("migrate_cancel")  # before it has even begun
                else:
                    os.close(reader)
                await here.until_status("cancelled" if cancelled else "failed")
                if cancelled:
                    await here.until(lambda reader=reader: _at_its_end(reader))  # type: ignore[misc]  # a default
                    os.close(reader)
            with pytest.raises(QMPError, match="'out' has not been found"):
                await here("migrate", uri="fd:out")
            assert (await here("query-status"))["running"]


def _at_its_end(reader: int) -> bool:
    os.set_blocking(reader, False)
    try:
        return not os.read(reader, 1 << 20)
    except BlockingIOError:
        return False


@pytest.mark.kvm
async def test_a_descriptor_that_is_refused_stays_the_clients() -> None:
    async with running() as here:
        reader, writer = os.pipe()
        pass_fd(here, "out", writer)
        with pytest.raises(BadURI, match="option"):
            await here("migrate", uri="fd:out?direct=on")
        assert "out" in here.session.fds
        await here("migrate", uri="fd:out")
        await here("migrate_cancel")
        await here.until_status("cancelled")
        os.close(writer)
        os.close(reader)


@pytest.mark.kvm
async def test_a_shell_command_with_a_question_mark_and_spaces_is_one(tmp_path: Path) -> None:
    saved = tmp_path / "guest image.gz"
    with trio.fail_after(PATIENCE):
        async with running(size=4 * MIB, hot="64KiB") as here:
            await here("migrate", uri=f"exec:gzip -1 > '{saved}' ; test $? = 0")
            await here.until_status("completed")
        async with awaiting() as there:
            await listening(there, f"exec:gzip -dc '{saved}'; test -e /etc/passw?")
            await there.control.incoming.wait()
            await check(there.control)


@pytest.mark.kvm
async def test_a_program_with_arguments_is_given_as_qemus_channel(tmp_path: Path) -> None:
    saved = tmp_path / "guest's image"
    with trio.fail_after(PATIENCE):
        async with running(size=4 * MIB, hot="64KiB") as here:
            addr: dict[str, object] = {"transport": "exec", "args": ["dd", f"of={saved}", "status=none"]}
            await here("migrate", channels=[{"channel-type": "main", "addr": addr}])
            await here.until_status("completed")
        async with awaiting() as there:
            addr = {"transport": "file", "filename": str(saved), "offset": 0}
            await there("migrate-incoming", channels=[{"channel-type": "main", "addr": addr}])
            await there.control.incoming.wait()


@pytest.mark.kvm
async def test_a_place_that_can_not_be_listened_at_may_be_followed_by_another(tmp_path: Path) -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there:
            with pytest.raises(ConnectFailed):
                await there("migrate-incoming", uri=f"unix:{tmp_path}/no/such/directory.sock")
            assert await there("query-migrate") == {}
            uri = await listening(there, f"unix:{tmp_path}/a.sock")
            assert (await there("query-migrate"))["socket-address"] == [
                {"type": "unix", "path": f"{tmp_path}/a.sock"}
            ]
            async with running(size=4 * MIB, hot="64KiB") as here:
                await here("migrate", uri=uri)
                await here.until_status("completed")
                await there.control.incoming.wait()


# -- a machine whose clients may start no program ---------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"uri": "exec:touch {there}"},
        {"uri": "exec:touch {there}?live=on"},
        {"uri": "throttle+exec:touch {there}"},
        {"uri": "fault+throttle+exec:touch {there}"},
        {"uri": "pipe:{there}?helper=/bin/true"},
        {"uri": "pipe:{there}?helper.file={helper}"},
        {"uri": "throttle+pipe:{there}?direct=off&helper=true"},
        {"channels": [{"channel-type": "main", "addr": {"transport": "exec", "args": ["touch", "{there}"]}}]},
    ],
)
@pytest.mark.parametrize("command", ["migrate", "migrate-incoming"])
@pytest.mark.kvm
async def test_a_machine_can_be_told_to_start_no_programs(
    tmp_path: Path, command: str, given: dict[str, Any]
) -> None:
    (tmp_path / "helper").write_text("/bin/true")
    text = json.dumps(given).replace("{there}", f"{tmp_path}/there").replace("{helper}", f"{tmp_path}/helper")
    async with running(size=4 * MIB, hot="64KiB") if command == "migrate" else awaiting() as lab:
        lab.control.settings.may_exec = False
        with pytest.raises(QMPError, match=r"would start a program, and this machine was told \(--no-exec\)"):
            await lab(command, **json.loads(text))
        assert await lab("query-migrate") == {}
    assert os.listdir(tmp_path) == ["helper"]


@pytest.mark.kvm
async def test_our_own_helper_is_no_program_of_a_clients(tmp_path: Path) -> None:
    async with running(size=4 * MIB, hot="64KiB") as lab:
        lab.control.settings.may_exec = False
        await lab("migrate", uri=f"pipe:{tmp_path}/a.img")
        await lab.until_status("completed")
