"""One machine under control: its run states, its events, and the rules between what is done to it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from kvmmig import guests
from kvmmig.errors import BadURI, KvmmigError, MigrationCancelled, OutcomeUnknown, StreamError, WrongState
from kvmmig.machine import Entry, Machine, MachineConfig, Program
from kvmmig.migration.phases import Phase
from kvmmig.monitor.control import MachineControl
from kvmmig.stream.format import HEADER, IDENTITY_SIZE, PREAMBLE
from tests.monitor.lab import MIB, PATIENCE, Lab, awaiting, check, listening, running

pytestmark = pytest.mark.kvm


async def test_a_guest_is_loaded_runs_pauses_goes_on_and_is_told_of() -> None:
    program = guests.find("dirtier").program(memory=16 * MIB, cpus=1, settings={"hot": "1MiB"})
    with trio.fail_after(PATIENCE):
        async with MachineControl.open(name="a") as control:
            lab = Lab(control)
            assert control.run_state() == "prelaunch"
            with pytest.raises(WrongState, match="'a' has no guest yet"):
                await control.resume()
            await control.load(
                MachineConfig(memory=16 * MIB, name="dirtier", parameters=program.parameters), program
            )
            assert control.run_state() == "prelaunch"
            await control.resume()
            assert control.run_state() == "running"
            await control.resume()  # it runs already
            await control.pause()
            assert control.run_state() == "paused"
            await control.pause()
            await control.resume()
            control.quit()
            assert (await control.wait()).ending is None
            with pytest.raises(WrongState, match="'a' has its guest already"):
                await control.load(MachineConfig(memory=16 * MIB), program)
            assert lab.named == ["RESUME", "STOP", "RESUME", "SHUTDOWN"]
            assert lab.events[-1][1] == {"guest": False, "reason": "host-qmp-quit"}


async def test_what_a_program_does_to_its_own_machine_is_told_too() -> None:
    program = guests.find("dirtier").program(memory=16 * MIB, cpus=1, settings={"hot": "1MiB"})
    config = MachineConfig(memory=16 * MIB, name="dirtier", parameters=program.parameters)
    with trio.fail_after(PATIENCE):
        async with Machine.open(config) as machine, MachineControl.open(name="a") as control:
            await machine.load(program)
            control.adopt(machine)
            lab = Lab(control)
            await machine.start()
            assert lab.named == ["RESUME"]
            await machine.pause()
            assert lab.named == ["RESUME", "STOP"]
            await control.pause()
            await machine.resume()
            await machine.reset()
            assert lab.named == ["RESUME", "STOP", "RESUME"]


async def test_what_is_asked_of_a_guest_that_is_being_loaded_waits_for_it() -> None:
    program = guests.find("dirtier").program(memory=16 * MIB, cpus=1, settings={"hot": "1MiB"})
    config = MachineConfig(memory=16 * MIB, name="dirtier", parameters=program.parameters)
    with trio.fail_after(PATIENCE):
        async with MachineControl.open(name="a") as control, awaiting() as there:
            lab = Lab(control)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: control.load(config, program, start=True))
                await trio.testing.wait_all_tasks_blocked()
                assert control.run_state() == "prelaunch"
                await lab("migrate", uri=await listening(there))
            assert lab.named[0] == "RESUME"
            await control.outgoing.wait()


@pytest.mark.parametrize("comes", [False, True])
async def test_what_is_asked_before_the_guest_is_there_waits_for_it(comes: bool) -> None:
    """A script may find the monitor before the command that starts it has got any further."""
    program = guests.find("dirtier").program(memory=16 * MIB, cpus=1, settings={"hot": "1MiB"})
    config = MachineConfig(memory=16 * MIB, name="dirtier", parameters=program.parameters)
    with trio.fail_after(PATIENCE):
        async with MachineControl.open(name="a", guest_follows=True) as control:
            lab = Lab(control)
            async with trio.open_nursery() as nursery:
                if comes:
                    nursery.start_soon(lambda: lab("migrate-incoming", uri="tcp:127.0.0.1:0"))
                else:
                    nursery.start_soon(lambda: lab("stop"))
                await trio.testing.wait_all_tasks_blocked()
                if comes:
                    control.incoming.defer()
                else:
                    await control.load(config, program, start=True)
            assert control.run_state() == ("inmigrate" if comes else "paused")


async def test_a_guest_that_ends_by_itself_ends_the_wait_with_its_status() -> None:
    with trio.fail_after(PATIENCE):
        async with running("hello", size=4 * MIB) as lab:
            ending = (await lab.control.wait()).ending
            assert ending is not None
            assert ending.kind == "exit"
            assert lab.control.run_state() == "shutdown"
            assert lab.events[-1] == ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})


async def test_a_guest_that_crashes_is_told_of_as_a_panic_with_the_report() -> None:
    # A jump to an address that no page table has: a triple fault.
    crashing = Program("crash", Entry.LONG64, b"\x48\xb8" + bytes([0, 0, 0, 0, 0, 1, 0, 0]) + b"\xff\xe0")
    with trio.fail_after(PATIENCE):
        async with MachineControl.open(name="a") as control:
            lab = Lab(control)
            await control.load(MachineConfig(memory=4 * MIB), crashing)
            await control.resume()
            await control.wait()
            assert control.run_state() == "guest-panicked"
            assert lab.named == ["RESUME", "GUEST_PANICKED", "SHUTDOWN"]
            assert "rip" in str(lab.events[1][1]["x-kvmmig-report"])
            assert lab.events[2][1] == {"guest": True, "reason": "guest-panic"}


async def test_a_guest_moves_and_both_sides_say_so() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            for lab in (here, there):
                lab.control.settings.set_capabilities([("events", True)])
            assert there.control.run_state() == "inmigrate"
            with pytest.raises(WrongState, match="has not arrived yet"):
                await there.control.resume()
            uri = await listening(there)
            here.control.outgoing.begin(uri)
            figures = await here.control.outgoing.wait()
            await there.control.incoming.wait()
            assert figures.sent_pages > 0
            assert here.control.run_state() == "postmigrate"
            assert there.control.run_state() == "running"
            assert [name for name in here.named if name != "MIGRATION_PASS"] == [
                *("RESUME", "setup", "active", "STOP", "device", "completed", "X_KVMMIG_MIGRATION_ENDED")
            ]
            assert here.events[-1][1]["figures"]["downtime"] == figures.downtime
            passes = [data["pass"] for name, data in here.events if name == "MIGRATION_PASS"]
            assert passes == list(range(1, len(figures.rounds) + 3))
            assert there.named == ["setup", "active", "RESUME", "completed"]
            with pytest.raises(WrongState, match="has moved away"):
                await here.control.resume()
            with pytest.raises(WrongState, match="has moved away"):
                here.control.outgoing.begin(uri)
            await check(there.control)


async def test_a_paused_guest_arrives_paused() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await here.control.pause()
            here.control.outgoing.begin(await listening(there))
            await here.control.outgoing.wait()
            await there.control.incoming.wait()
            assert there.control.run_state() == "paused"
            there.control.outgoing.check()  # it can move on as it is
            await there.control.resume()
            assert there.control.run_state() == "running"


async def test_a_guest_that_ends_as_it_arrives_is_told_of_and_its_source_knows_that_it_came() -> None:
    # It waits for a key, and dies of it: 0x3fd says whether there is one.
    dies_on_a_key = Program("dies", Entry.LONG64, b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xfb\x0f\x0b")
    with trio.fail_after(PATIENCE):
        async with MachineControl.open(name="here") as here:
            await here.load(MachineConfig(memory=4 * MIB), dies_on_a_key, start=True)
            here.settings.set_capabilities([("pause-before-switchover", True)])
            async with awaiting() as there:
                here.outgoing.begin(await listening(there))
                await there.until(lambda: here.outgoing.status == "pre-switchover")
                assert here.machine is not None
                assert here.outgoing.migration is not None
                await here.machine.feed(b"x")
                here.outgoing.migration.proceed()
                ending = (await there.control.wait()).ending
            assert ending is not None
            assert ending.kind == "crash"
            assert "rip" in str(ending.report)
            assert (await here.outgoing.wait()).phase is Phase.DONE


async def test_a_cancelled_migration_leaves_the_guest_running_and_tells_so() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as lab:
            control = lab.control
            control.settings.set_capabilities([("events", True), ("pause-before-switchover", True)])
            async with awaiting() as there:
                control.outgoing.begin(await listening(there))
                await lab.until(lambda: control.outgoing.status == "pre-switchover")
                await lab.until(lambda: control.run_state() == "finish-migrate")
                for refused in (control.pause, control.resume):
                    with pytest.raises(WrongState, match="not finalized"):
                        await refused()
                with pytest.raises(WrongState, match="can't be reset while it migrates"):
                    await control.reset()
                with pytest.raises(WrongState, match="There's a migration process in progress"):
                    control.outgoing.begin("tcp:127.0.0.1:1")
                control.outgoing.cancel()
                assert control.outgoing.status == "cancelling"
                with pytest.raises(MigrationCancelled):
                    await control.outgoing.wait()
                assert control.run_state() == "running"
                await there.until(lambda: there.control.incoming.error)
                assert there.control.incoming.status == "setup", "another guest may come"
            assert [name for name in lab.named if name != "MIGRATION_PASS"] == [
                *("RESUME", "setup", "active", "STOP", "pre-switchover", "cancelling", "RESUME", "cancelled"),
                "X_KVMMIG_MIGRATION_ENDED",
            ]
            control.outgoing.cancel()  # none is running
            await check(control)


async def test_a_failed_migration_leaves_the_guest_running_and_another_one_may_follow() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as lab:
            with pytest.raises(BadURI):
                lab.control.outgoing.begin("pigeon:coop")
            assert lab.control.outgoing.migration is None
            lab.control.outgoing.begin("tcp:127.0.0.1:1")
            with pytest.raises(KvmmigError, match="nobody listens"):
                await lab.control.outgoing.wait()
            assert lab.control.outgoing.status == "failed"
            assert lab.control.run_state() == "running"
            async with awaiting() as there:
                lab.control.outgoing.begin(await listening(there))
                await lab.control.outgoing.wait()


async def test_leaving_in_the_middle_of_a_migration_gives_the_other_side_no_guest() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there:
            async with running() as here:
                here.control.settings.set_capabilities([("pause-before-switchover", True)])
                here.control.outgoing.begin(await listening(there))
                await here.until(lambda: here.control.outgoing.status == "pre-switchover")
            await there.until(lambda: there.control.incoming.error)
            assert there.control.machine is None


async def test_after_a_migration_whose_outcome_nobody_knows_only_an_operator_gets_the_guest_back() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as lab:
            async with awaiting() as there:
                uri = await listening(there)
                # It is cut in "running", behind the stream's beginning, "accept" and "ready".
                at = PREAMBLE.size + IDENTITY_SIZE + 2 * HEADER.size + 1
                lab.control.outgoing.begin(f"fault+{uri}?fault.what=cut&fault.side=receive&fault.at={at}")
                with pytest.raises(OutcomeUnknown, match="Look there first"):
                    await lab.control.outgoing.wait()
            assert lab.control.outgoing.status == "failed"
            assert lab.control.run_state() == "postmigrate"
            with pytest.raises(WrongState, match="moved away"):
                await lab.control.resume()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lab.control.wait_taken_back)
                await trio.testing.wait_all_tasks_blocked()
                await lab.control.take_back()
            assert lab.control.run_state() == "running"
            with pytest.raises(WrongState, match="nothing to take back"):
                await lab.control.take_back()
            await check(lab.control)


async def test_what_does_not_arrive_ends_the_wait_or_may_be_tried_again() -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there:
            with pytest.raises(WrongState, match="on its way"):
                await there.control.incoming.wait()
            await there.control.incoming.listen(
                "exec:echo this is no guest, however long", exit_on_error=False
            )
            with pytest.raises(StreamError):
                await there.control.incoming.wait()
            assert there.control.run_state() == "inmigrate"
            await there.control.incoming.listen("exec:echo this is no guest, however long")
            with pytest.raises(StreamError):
                await there.control.wait_guest()
            with pytest.raises(StreamError):
                await there.control.wait()


async def test_a_reset_is_told_of() -> None:
    with trio.fail_after(PATIENCE):
        async with running() as lab:
            await lab.control.reset()
            assert lab.events[-1] == ("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
            assert lab.control.run_state() == "running"
