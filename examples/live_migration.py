"""A live migration in one process: a guest that never stops writing moves from one machine to another.

python examples/live_migration.py
"""

from __future__ import annotations

import trio

import kvmmig
from kvmmig import guests
from kvmmig.units import format_duration


async def receive(arrived: trio.Event, task_status: trio.TaskStatus[kvmmig.TransportURI]) -> None:
    """The destination: builds the machine that the source describes, and lets the guest go on."""
    letters = bytearray()
    here = kvmmig.receive("tcp:127.0.0.1:0", output=letters.extend, on_listening=task_status.started)
    async with here as machine:
        arrived.set()
        await trio.sleep(0.5)  # it rewrites its memory here now
        await machine.pause()
        check = await trio.to_thread.run_sync(guests.check_machine, machine)
        print(f"destination: it printed {letters.decode()!r} here")
        print(f"destination: {check.summary if check else 'nothing to check'}")


async def main() -> None:
    arrived = trio.Event()
    async with (
        kvmmig.open_machine("dirtier", memory="64MiB", settings={"hot": "8MiB"}) as source,
        trio.open_nursery() as nursery,
    ):
        uri = await nursery.start(receive, arrived)
        await source.start()
        await trio.sleep(0.5)  # it fills its memory

        print(f"source: moving 64 MiB to {uri} while the guest writes")
        figures = await kvmmig.migrate(source, uri)
        await arrived.wait()
        for one in figures.rounds:
            print(
                f"source: round {one.round}: {one.sent_pages} pages sent, {one.dirty_pages} written meanwhile"
            )
        assert figures.downtime is not None
        print(f"source: moved; the guest was stopped for {format_duration(figures.downtime)}")


if __name__ == "__main__":
    trio.run(main)
