"""A guest's life in three calls: open a machine, move it, take it in.

What they are made of can be used by itself where more is wanted: `Machine`, `OutgoingMigration` (its figures
while it runs), `IncomingMigration`, `transport_for`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import BadConfig
from kvmmig.guests.programs import find_program
from kvmmig.machine import ExitHook, Machine, MachineConfig
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, Policy
from kvmmig.migration.report import MigrationStatistics
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.units import MEMORY, parse_bandwidth, parse_size


@asynccontextmanager
async def open_machine(
    guest: str | os.PathLike[str],
    *,
    memory: int | str = "256MiB",
    cpus: int = 1,
    settings: Mapping[str, int | str] | None = None,
    entry: str | None = None,
    output: Callable[[bytes], None] | None = None,
    on_exit: ExitHook | None = None,
) -> AsyncIterator[Machine]:
    """A machine with a guest loaded, to be started; closed at the end of the block, whatever happens in it.

    >>> said = bytearray()
    >>> async with kvmmig.open_machine("hello", memory="4MiB", output=said.extend) as machine:
    ...     await machine.start()
    ...     print(await machine.wait())
    it exited with status 0
    >>> print(said.decode().strip())
    Hello from a KVM guest at privilege level 3.

    ``guest`` is a toy guest's name, the path of an .asm or of a static ELF64, or that of a flat image, whose
    ``entry`` says how it starts: ``real16`` or ``long64``. ``memory`` is in bytes, or text such as
    ``"1GiB"``. ``settings`` are a toy guest's parameters. ``output`` gets what the guest sends to its serial
    port, in vCPU threads, and must not block. ``on_exit`` serves a port, or another exit, of your own, as for
    `Machine.open`.

    Raises `BadConfig`, `BadImage`, `KvmError`. A cancel leaves nothing behind.
    """
    try:
        size = parse_size(memory, MEMORY) if isinstance(memory, str) else memory
    except ValueError as error:
        raise BadConfig(f"memory: {error}") from error
    MachineConfig(memory=size, cpus=cpus)  # what can't exist is refused before a guest is assembled for it
    program = await trio.to_thread.run_sync(
        lambda: find_program(
            os.fspath(guest), entry=entry, memory=size, cpus=cpus, settings=settings if settings else {}
        )
    )
    config = MachineConfig(memory=size, cpus=cpus, name=program.name, parameters=program.parameters)
    async with Machine.open(config, output=output, on_exit=on_exit) as machine:
        await machine.load(program)
        yield machine


async def migrate(
    machine: Machine,
    to: str | TransportURI | Transport,
    *,
    policy: Policy | None = None,
    limits: Limits | None = None,
    bandwidth: float | str | None = None,
    record: str | os.PathLike[str] | None = None,
) -> MigrationStatistics:
    """Move a running or paused guest; returns the figures once it has moved.

    >>> async with kvmmig.open_machine("dirtier", memory="8MiB", settings={"hot": "1MiB"}) as machine:
    ...     await machine.start()
    ...     figures = await kvmmig.migrate(machine, "exec:cat > /dev/null", bandwidth="1GB/s")
    ...     print(figures.phase, "and the guest", machine.state)
    done and the guest has moved away

    ``to`` is a URI, such as ``tcp:host:4444`` or ``file:/var/tmp/a.img``. ``policy`` says when to stop the
    guest; without one that is when 300 ms of downtime are expected, or after 30 rounds. ``limits`` bounds
    everything else, in seconds; ``bandwidth``, in bytes a second or text such as ``"500MB/s"``, goes before
    the one in it. ``record`` is a file to append a record to (docs/record.md). A `Monitor`'s clients know
    nothing of this migration: for one that they see, and may cancel, there is `Monitor.migrate`.

    Raises a `TransportError`, `StreamError` or `MigrationError` when the guest has not moved, `WrongState`
    where it can't, `ValueError` for a bandwidth that is none. After any of them, and after a cancel, the
    guest is here, and runs if it ran; the other side has nothing. The exceptions are `OutcomeUnknown`, whose
    text says what an operator must find out, and a cancel that comes after the hand-over: then the guest
    `has moved away`, as `Machine.state` says.
    """
    rate = parse_bandwidth(bandwidth)
    # It imports modules, and looks for packages that bring more of them.
    transport = to if isinstance(to, Transport) else await trio.to_thread.run_sync(transport_for, to)
    migration = OutgoingMigration(machine, transport, policy=policy, limits=limits, record=record)
    if rate is not None:
        migration.set_bandwidth(rate)
    return await migration.run()


@asynccontextmanager
async def receive(
    at: str | TransportURI | Transport,
    *,
    output: Callable[[bytes], None] | None = None,
    on_exit: ExitHook | None = None,
    on_listening: Callable[[TransportURI], None] | None = None,
    record: str | os.PathLike[str] | None = None,
) -> AsyncIterator[Machine]:
    """Wait for a guest, and take it in; it runs if it ran at the source, else it is yet to be started.

    >>> async def take_in(task_status):
    ...     async with kvmmig.receive("tcp:127.0.0.1:0", on_listening=task_status.started) as machine:
    ...         print("here the guest", machine.state)
    >>> async with kvmmig.open_machine("echo", memory="4MiB") as machine:
    ...     await machine.start()
    ...     async with trio.open_nursery() as nursery:
    ...         uri = await nursery.start(take_in)
    ...         await kvmmig.migrate(machine, uri)
    ...     print("there the guest", machine.state)
    here the guest is running
    there the guest has moved away

    ``at`` is a URI to listen at, or what a guest was saved to. ``on_listening`` is called once with the URI
    for the source, which has the real port where port 0 was asked for. ``output`` and ``on_exit`` are as for
    `open_machine`, ``record`` as for `migrate`. The machine is closed at the end of the block.

    Raises `BadURI`, `ConnectFailed`, `StreamError` for bytes that are no whole guest, `StateMismatch` for a
    guest that can't live here, `MigrationError` where the source gave up. After any of them, and after a
    cancel before the guest is here, nothing is left here, and the source keeps its guest.
    """
    transport = at if isinstance(at, Transport) else await trio.to_thread.run_sync(transport_for, at)
    incoming = IncomingMigration(
        transport, output=output, on_exit=on_exit, on_listening=on_listening, record=record
    )
    async with incoming.machine() as machine:
        yield machine
