"""A guest's life from Python: opened, moved, taken in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

import kvmmig
from kvmmig import guests
from tests.api.lab import PATIENCE, SINK, running_dirtier, state_of
from tests.assembling import need_nasm

MIB = 1 << 20
STALLED = f"fault+{SINK}?fault.what=stall&fault.at=1MiB"
#: mov ax, 0x2a; out 0xf4, al: a boot sector's beginning that exits with 42, 16-bit.
EXITS = bytes.fromhex("b8 2a 00 e6 f4")


async def memory_is_right(machine: kvmmig.Machine) -> bool:
    await machine.pause()
    check = await trio.to_thread.run_sync(guests.check_machine, machine)
    return check is not None and check.ok


# -- open_machine -----------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_a_machine_is_loaded_and_waits_for_its_start_and_is_closed_with_the_block() -> None:
    async with kvmmig.open_machine("dirtier", memory=8 * MIB, cpus=2, settings={"hot": MIB}) as machine:
        assert state_of(machine) is kvmmig.State.CREATED
        assert (machine.config.memory, machine.config.cpus) == (8 * MIB, 2)
        assert machine.config.parameters["hot"] == MIB
    assert state_of(machine) is kvmmig.State.CLOSED


@pytest.mark.kvm
@pytest.mark.parametrize("as_path", [str, Path])
async def test_a_flat_image_runs_from_its_entry(tmp_path: Path, as_path: type[str] | type[Path]) -> None:
    image = tmp_path / "exits"
    image.write_bytes(EXITS)
    with trio.fail_after(PATIENCE):
        async with kvmmig.open_machine(as_path(image), entry="real16", memory="1MiB") as machine:
            await machine.start()
            assert await machine.wait() == kvmmig.Ending("exit", 42)


@pytest.mark.kvm
async def test_an_asm_runs_with_its_settings(tmp_path: Path) -> None:
    need_nasm()
    source = "; leaves: ends\n;@ entry long64\n;@ param with = 1\nmov al, [0x9f000]\nout 0xf4, al\n"
    (tmp_path / "leaves.asm").write_text(source)
    with trio.fail_after(PATIENCE):
        async with kvmmig.open_machine(
            tmp_path / "leaves.asm", memory="4MiB", settings={"with": 7}
        ) as machine:
            await machine.start()
            assert (await machine.wait()).status == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"guest": "hello", "memory": "much"}, "memory: 'much' is not a size; write it like 64MiB"),
        ({"guest": "hello", "memory": 5}, "a machine's memory can't be 5B; use 1MiB to 64GiB"),
        ({"guest": "hello", "cpus": 0}, "a machine's number of vCPUs can't be 0"),
        ({"guest": "helo"}, "there is no guest 'helo'; use dirtier, echo, heartbeat, hello"),
        ({"guest": "hello", "settings": {"hot": 1}}, "hello has no parameter 'hot'"),
        ({"guest": os.devnull, "entry": "bios"}, "entry 'bios': a program starts in real16, long64, elf"),
        ({"guest": __file__}, 'in Python, entry="real16"'),
    ],
)
async def test_what_cannot_be_opened_is_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(kvmmig.MachineError) as caught:
        async with kvmmig.open_machine(**arguments):  # type: ignore[arg-type] # wrong on purpose
            pass
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# -- migrate and receive ----------------------------------------------------------------------------


@pytest.mark.kvm
async def test_a_guest_moves_and_goes_on_where_it_is_received() -> None:
    letters = bytearray()
    arrived = trio.Event()

    async def take_in(task_status: trio.TaskStatus[kvmmig.TransportURI]) -> None:
        async with kvmmig.receive(
            "tcp:127.0.0.1:0", output=letters.extend, on_listening=task_status.started
        ) as machine:
            assert state_of(machine) is kvmmig.State.RUNNING
            while not letters:  # noqa: ASYNC110 -- the guest has no event for it
                await trio.sleep(0.001)
            assert await memory_is_right(machine)
            arrived.set()

    async with running_dirtier() as machine, trio.open_nursery() as nursery:
        uri = await nursery.start(take_in)
        assert not str(uri).endswith(":0")
        figures = await kvmmig.migrate(machine, uri)
        await arrived.wait()
    assert figures.phase is kvmmig.Phase.DONE
    assert figures.sent_pages > 0


@pytest.mark.kvm
async def test_a_paused_guest_is_saved_and_received_from_the_file_to_be_started(tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/a.img"
    async with running_dirtier() as machine:
        await machine.pause()
        await kvmmig.migrate(machine, kvmmig.transport_for(uri))
    async with kvmmig.receive(uri) as machine:
        assert state_of(machine) is kvmmig.State.PAUSED
        await machine.start()
        assert await memory_is_right(machine)


@pytest.mark.kvm
async def test_policy_limits_and_bandwidth_are_those_that_were_given() -> None:
    async with running_dirtier() as machine:
        figures = await kvmmig.migrate(
            machine,
            SINK,
            policy=kvmmig.MaxRounds(2),
            limits=kvmmig.Limits(step=0.5, bandwidth=1e6),
            bandwidth="1GB/s",
        )
    assert len(figures.rounds) == 2
    assert (figures.step_bound, figures.bandwidth) == (0.5, 1e9)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("to", "bandwidth", "error", "sentence"),
    [
        ("nowhere", None, kvmmig.BadURI, "is not a transport URI"),
        ("tcp:127.0.0.1:1", None, kvmmig.ConnectFailed, "127.0.0.1:1"),
        (SINK, 0, ValueError, "a bandwidth of 0 would never end it"),
        (SINK, "quick", ValueError, "'quick' is not a rate; write it like 500MB/s"),
    ],
)
async def test_a_guest_that_cannot_leave_goes_on(
    to: str, bandwidth: float | str | None, error: type[Exception], sentence: str
) -> None:
    async with running_dirtier() as machine:
        with pytest.raises(error, match=sentence):
            await kvmmig.migrate(machine, to, bandwidth=bandwidth)
        assert state_of(machine) is kvmmig.State.RUNNING
        await kvmmig.migrate(machine, SINK)


@pytest.mark.kvm
async def test_a_cancel_gives_the_guest_back() -> None:
    async with running_dirtier() as machine:
        begun = trio.Event()
        migration = kvmmig.OutgoingMigration(
            machine, STALLED, on_phase=lambda phase: begun.set() if phase is kvmmig.Phase.ROUNDS else None
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migration.run)
            await begun.wait()
            await trio.sleep(0.05)  # somewhere in its steps
            nursery.cancel_scope.cancel()
        assert migration.statistics().phase is kvmmig.Phase.CANCELLED
        assert state_of(machine) is kvmmig.State.RUNNING
        assert await memory_is_right(machine)


@pytest.mark.kvm
async def test_a_second_migration_of_a_guest_is_refused_and_does_no_harm_to_the_first(tmp_path: Path) -> None:
    """The dirty log forgets what it has told; were it told to two, both would lose pages."""
    uri = f"file:{tmp_path}/a.img"
    async with running_dirtier() as machine:
        first = kvmmig.OutgoingMigration(machine, uri, limits=kvmmig.Limits(bandwidth=1e6))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            while first.statistics().phase is not kvmmig.Phase.ROUNDS:  # noqa: ASYNC110 -- in another task
                await trio.sleep(0.001)
            with pytest.raises(kvmmig.WrongState, match="dirty log is in use already"):
                await kvmmig.migrate(machine, SINK)
            assert state_of(machine) is kvmmig.State.RUNNING
            first.set_bandwidth(None)
        assert state_of(machine) is kvmmig.State.MOVED
    async with kvmmig.receive(uri) as machine:
        assert await memory_is_right(machine)


@pytest.mark.kvm
async def test_a_receiver_that_is_cancelled_before_anybody_came_listens_no_more() -> None:
    uris: list[kvmmig.TransportURI] = []
    with trio.CancelScope() as scope:

        def listening(uri: kvmmig.TransportURI) -> None:
            uris.append(uri)
            scope.cancel()

        async with kvmmig.receive("tcp:127.0.0.1:0", on_listening=listening):
            pytest.fail("nobody came")
    async with running_dirtier() as machine:
        with pytest.raises(kvmmig.ConnectFailed):
            await kvmmig.migrate(machine, uris[0])


@pytest.mark.kvm
async def test_what_is_no_guest_is_not_received(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(10000))
    with pytest.raises(kvmmig.StreamError):
        async with kvmmig.receive(f"file:{tmp_path}/a.img"):
            pytest.fail("there is no guest in it")
