"""A monitor for a machine that a program has opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import kvmmig
from tests.api.lab import PATIENCE, SINK, dirtier, running_dirtier, state_of

SLOW = f"throttle+{SINK}?throttle.rate=2MB/s"


@asynccontextmanager
async def served() -> AsyncIterator[tuple[kvmmig.Machine, kvmmig.Monitor, kvmmig.QMPClient]]:
    """A running guest, its monitor, and a client of that."""
    async with (
        running_dirtier() as machine,
        kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor,
        kvmmig.QMPClient.connect(monitor.addresses[0]) as client,
    ):
        yield machine, monitor, client


async def until_status(client: kvmmig.QMPClient, *wanted: str) -> dict[str, Any]:
    while True:
        info: dict[str, Any] = await client.execute("query-migrate")
        if info.get("status") in wanted:
            return info
        await trio.sleep(0.005)


pytestmark = pytest.mark.kvm


async def test_clients_see_the_machine_at_every_address(tmp_path: Path) -> None:
    async with dirtier() as machine:
        async with kvmmig.Monitor(machine, f"unix:{tmp_path}/a.sock", "tcp:127.0.0.1:0") as monitor:
            assert monitor.addresses[0] == f"unix:{tmp_path}/a.sock"
            assert not monitor.addresses[1].endswith(":0")
            for address in monitor.addresses:
                async with kvmmig.QMPClient.connect(address) as client:
                    assert (await client.execute("query-name"))["name"] == "dirtier"
                    assert (await client.execute("query-status"))["status"] == "prelaunch"
            await machine.start()
            async with kvmmig.QMPClient.connect(address) as client:
                assert (await client.execute("query-status"))["running"]
                await client.execute("stop")
                assert state_of(machine) is kvmmig.State.PAUSED
                await monitor.control.resume()
                await machine.pause()
                await machine.resume()
                told = [(await client.next_event()).name for _ in range(4)]
                assert told == ["STOP", "RESUME"] * 2
        assert state_of(machine) is kvmmig.State.RUNNING
        assert not (tmp_path / "a.sock").exists()
        with pytest.raises(kvmmig.ConnectFailed):
            async with kvmmig.QMPClient.connect(monitor.addresses[1]):
                pass


async def test_quit_ends_the_guest_and_not_the_program() -> None:
    async with served() as (machine, _, client):
        await client.execute("quit")
        assert (await machine.wait()).kind == "ended"
        with pytest.raises(kvmmig.KvmmigError):  # whoever has said quit is answered no more
            await client.execute("query-status")


async def test_quit_cancels_a_migration_first() -> None:
    async with served() as (machine, _, client):
        await client.execute("migrate", {"uri": SLOW})
        await until_status(client, "active")
        await client.execute("quit")
        assert (await machine.wait()).kind == "ended"


async def test_a_migration_by_the_monitor_is_the_clients_too() -> None:
    async with served() as (machine, monitor, client), trio.open_nursery() as nursery:
        ended: list[kvmmig.KvmmigError] = []

        async def leave() -> None:
            try:
                await monitor.migrate(SLOW, bandwidth="1GB/s")
            except kvmmig.KvmmigError as error:
                ended.append(error)

        nursery.start_soon(leave)
        await until_status(client, "active")
        with pytest.raises(kvmmig.QMPError, match="There's a migration process in progress"):
            await client.execute("migrate", {"uri": SINK})
        own = await client.execute("x-kvmmig-query-migration")
        assert own["bandwidth"] == 1e9
        await client.execute("migrate_cancel")
        await until_status(client, "cancelled")
        while not ended:  # noqa: ASYNC110 -- the other task is about to get it
            await trio.sleep(0.001)
        assert isinstance(ended[0], kvmmig.MigrationCancelled)
        assert state_of(machine) is kvmmig.State.RUNNING


async def test_a_client_s_migration_keeps_the_program_from_another_one() -> None:
    async with served() as (machine, monitor, client):
        await client.execute("migrate", {"uri": SLOW})
        with pytest.raises(kvmmig.WrongState, match="There's a migration process in progress"):
            await monitor.migrate(SINK)
        await until_status(client, "active")
        with pytest.raises(kvmmig.WrongState, match="dirty log is in use already"):
            await kvmmig.migrate(machine, SINK)
        assert (await client.execute("query-migrate"))["status"] == "active"
        assert state_of(machine) is kvmmig.State.RUNNING


async def test_of_a_migration_beside_the_monitor_its_clients_see_only_what_it_does_to_the_guest() -> None:
    async with served() as (machine, _, client):
        await kvmmig.migrate(machine, SINK)
        assert await client.execute("query-migrate") == {}
        assert (await client.execute("query-status"))["status"] == "postmigrate"
        with pytest.raises(kvmmig.QMPError, match="has moved away"):
            await client.execute("cont")


@pytest.mark.parametrize(
    ("to", "bandwidth", "error", "sentence"),
    [
        ("nowhere", None, kvmmig.BadURI, "is not a transport URI"),
        ("tcp:127.0.0.1:1", None, kvmmig.ConnectFailed, "127.0.0.1:1"),
        (SINK, 0, ValueError, "a bandwidth of 0 would never end it"),
    ],
)
async def test_a_monitor_s_migration_fails_as_any_other_does(
    to: str, bandwidth: float | None, error: type[Exception], sentence: str
) -> None:
    async with served() as (machine, monitor, _):
        with pytest.raises(error, match=sentence):
            await monitor.migrate(to, bandwidth=bandwidth)
        assert state_of(machine) is kvmmig.State.RUNNING


async def test_a_cancelled_call_is_a_cancelled_migration_for_the_clients() -> None:
    async with served() as (machine, monitor, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.migrate, SLOW)
            await until_status(client, "active")
            nursery.cancel_scope.cancel()
        assert (await client.execute("query-migrate"))["status"] == "cancelled"
        assert state_of(machine) is kvmmig.State.RUNNING
        figures = await monitor.migrate(SINK, policy=kvmmig.MaxRounds(1))
        assert len(figures.rounds) == 1
        assert (await client.execute("query-migrate"))["status"] == "completed"


async def test_a_monitor_that_goes_ends_its_migration_and_keeps_the_guest() -> None:
    async with running_dirtier() as machine:
        ended: list[kvmmig.KvmmigError] = []
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                try:
                    await monitor.migrate(SLOW)
                except kvmmig.KvmmigError as error:
                    ended.append(error)

            async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor:
                nursery.start_soon(leave)
                while not monitor.control.outgoing.active:  # noqa: ASYNC110 -- it begins in another task
                    await trio.sleep(0.001)
        assert isinstance(ended[0], kvmmig.MigrationCancelled)
        assert state_of(machine) is kvmmig.State.RUNNING
        await kvmmig.migrate(machine, SINK)


async def test_two_monitors_of_one_machine_can_not_take_each_other_s_pages() -> None:
    async with served() as (machine, first, client):
        await client.execute("migrate", {"uri": SLOW})
        await until_status(client, "active")
        async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as second:
            with pytest.raises(kvmmig.WrongState, match="dirty log is in use already"):
                await second.migrate(SINK)
        assert first.control.outgoing.active
        assert state_of(machine) is kvmmig.State.RUNNING


async def test_an_address_that_cannot_be_is_refused_and_the_machine_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with dirtier() as machine:
        with pytest.raises(kvmmig.BadURI, match="is not a monitor's address"):
            kvmmig.Monitor(machine, "a.sock")
        with pytest.raises(kvmmig.ConnectFailed, match="something that is no socket has that name"):
            async with kvmmig.Monitor(machine, f"unix:{tmp_path}/file"):
                pass
        async with kvmmig.Monitor(machine, f"unix:{tmp_path}/a.sock"):
            pass


async def test_the_block_s_own_error_comes_out_as_it_is() -> None:
    cause = OSError("the cause")
    async with dirtier() as machine:
        with pytest.raises(kvmmig.MachineError, match="mine") as caught:
            async with kvmmig.Monitor(machine, "tcp:127.0.0.1:0"):
                raise kvmmig.MachineError("mine") from cause
        assert caught.value.__cause__ is cause


async def test_a_machine_under_control_is_served_by_that_control() -> None:
    with trio.fail_after(PATIENCE):
        async with (
            kvmmig.MachineControl.open(name="a") as control,
            kvmmig.Monitor(control, "tcp:127.0.0.1:0") as monitor,
            kvmmig.QMPClient.connect(monitor.addresses[0]) as client,
        ):
            assert monitor.control is control
            assert (await client.execute("query-name"))["name"] == "a"
            await client.execute("quit")
            assert await control.wait() == kvmmig.Outcome()
