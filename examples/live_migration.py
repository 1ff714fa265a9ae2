"""A live migration in one process: a guest that never stops writing moves from one machine to another.

python examples/live_migration.py
"""

from __future__ import annotations

import trio

from kvmmig import IncomingMigration, Machine, MachineConfig, OutgoingMigration, guests, transport_for
from kvmmig.transport import Listener
from kvmmig.units import format_duration, format_size

MEMORY = 64 << 20


async def receive(listener: Listener, arrived: trio.Event) -> None:
    """The destination: builds the machine that the source describes, and lets the guest go on."""
    letters = bytearray()
    async with await listener.accept() as channel:
        incoming = IncomingMigration(channel, output=letters.extend)
        async with incoming.machine() as machine:
            arrived.set()
            await trio.sleep(0.5)  # it rewrites its memory here now
            await machine.pause()
            check = await trio.to_thread.run_sync(guests.check_machine, machine)
            print(f"destination: it printed {letters.decode()!r} here")
            print(f"destination: {check.summary if check else 'nothing to check'}")


async def main() -> None:
    program = guests.find("dirtier").program(memory=MEMORY, cpus=1, settings={"hot": "8MiB"})
    config = MachineConfig(memory=MEMORY, name=program.name, parameters=program.parameters)
    arrived = trio.Event()

    async with (
        Machine.open(config) as source,
        await transport_for("tcp:127.0.0.1:0").listen() as listener,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(receive, listener, arrived)
        await source.load(program)
        await source.start()
        await trio.sleep(0.5)  # it fills its memory

        print(f"source: moving {format_size(MEMORY)} to {listener.uri} while the guest writes")
        figures = await OutgoingMigration(source, listener.uri).run()
        await arrived.wait()
        for one in figures.rounds:
            print(
                f"source: round {one.round}: {one.sent_pages} pages sent, {one.dirty_pages} written meanwhile"
            )
        assert figures.downtime is not None
        print(f"source: moved; the guest was stopped for {format_duration(figures.downtime)}")


if __name__ == "__main__":
    trio.run(main)
