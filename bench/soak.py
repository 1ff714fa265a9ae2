"""One guest, moved back and forth over and over: random transports, limits, policies, cancels and faults.

    make soak                                   200 moves, some minutes
    python bench/soak.py --moves 20 --seed 7    the same ones again

After each move, or each failed try, the guest must go on, and every page must be what it must be. At the end
there must be no more descriptors, threads and processes than at the beginning, and hardly more memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import trio

from kvmmig import guests
from kvmmig.errors import KvmmigError, MigrationError
from kvmmig.machine import Machine, MachineConfig, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import (
    AutoConverge,
    DowntimeLimit,
    FirstOf,
    Limits,
    MaxRounds,
    NoProgress,
    Policy,
)
from kvmmig.transport import TransportURI, transport_for
from kvmmig.transport.toolkit import own_tasks

MIB = 1 << 20
SIZE = 32 * MIB
CPUS = 2


class Lost(Exception):
    """A page, or the guest, or something that should have been given back."""


@dataclass
class Guest:
    """Where the guest lives now. ``stack`` owns the machine."""

    machine: Machine
    stack: AsyncExitStack
    letters: bytearray = field(default_factory=bytearray)

    async def check(self) -> None:
        """It goes on, and all of its pages are right."""
        before = len(self.letters)
        with trio.fail_after(60):
            while len(self.letters) == before:
                if self.machine.state is not State.RUNNING:
                    raise Lost(f"the guest {self.machine.state}: {bytes(self.letters[-200:])!r}")
                await trio.sleep(0.002)
        await self.machine.pause()
        result = await trio.to_thread.run_sync(guests.check_machine, self.machine)
        await self.machine.resume()
        if result is None or not result.ok or b"FAIL" in self.letters:
            raise Lost(f"{result and result.summary}; {bytes(self.letters[-200:])!r}")


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    fds: int
    threads: int
    children: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        own = [thread for thread in threading.enumerate() if "Trio" not in thread.name]  # trio keeps a cache
        return cls(len(os.listdir("/proc/self/fd")), len(own), len(children), resident)


class Soak:
    """All the moves of one seed."""

    def __init__(self, seed: int, directory: Path, *, quiet: bool) -> None:
        self._random = random.Random(seed)
        self._directory = directory
        self._quiet = quiet
        self.moved = self.failed = 0

    async def run(self, moves: int) -> None:
        async with own_tasks() as self._strays:
            await self._run(moves)

    async def _run(self, moves: int) -> None:
        stack = AsyncExitStack()
        letters = bytearray()
        program = guests.find("dirtier").program(
            memory=SIZE, cpus=CPUS, settings={"hot": "4MiB", "stride": self._random.choice([1, 2, 3])}
        )
        config = MachineConfig(memory=SIZE, cpus=CPUS, name=program.name, parameters=program.parameters)
        machine = await stack.enter_async_context(Machine.open(config, output=letters.extend))
        guest = Guest(machine, stack, letters)
        try:
            await machine.load(program)
            await machine.start()
            await guest.check()
            held: Held | None = None
            for number in range(moves):
                guest = await self._one(number, guest)
                if number == min(20, moves // 2):  # what is kept for good has been taken by now
                    held = await self._settled()
            self._compare(held or Held.now(), await self._settled())
        finally:
            with trio.CancelScope(shield=True):
                await guest.stack.aclose()

    async def _settled(self) -> Held:
        """What is held once aborted channels have been cleaned up behind the loop's back."""
        held = Held.now()
        for _ in range(200):
            await trio.sleep(0.01)
            again = Held.now()
            if (again.fds, again.threads, again.children) >= (held.fds, held.threads, held.children):
                break
            held = again
        return held

    def _compare(self, before: Held, after: Held) -> None:
        for name in ("fds", "threads", "children"):
            if getattr(after, name) > getattr(before, name):
                raise Lost(f"{name}: {getattr(before, name)} before, {getattr(after, name)} after")
        if after.resident > before.resident + SIZE:
            raise Lost(f"resident memory grew by {(after.resident - before.resident) / MIB:.0f} MiB")

    async def _one(self, number: int, guest: Guest) -> Guest:
        choose = self._random
        scheme = choose.choice(["tcp", "unix", "pipe", "file", "exec"])
        path = self._directory / f"guest-{number}"
        where = {
            "tcp": TransportURI("tcp", "127.0.0.1:0"),
            "unix": TransportURI("unix", f"{path}.sock"),
            "exec": TransportURI("exec", f"cat > {path}.img", {"live": "off"}),
        }.get(scheme, TransportURI(scheme, f"{path}.img", {"direct": choose.choice(["on", "off"])}))
        what = choose.choice(["move", "move", "move", "cancel", "peer dies", "cut"])
        limits = Limits(
            step=choose.choice([0.001, 0.010]),
            bandwidth=choose.choice([None, None, 100e6, 400e6]),
            timeout=choose.choice([None, None, 0.2]),
            on_timeout="force",
            stall_timeout=5,
        )
        begin = perf_counter()
        error = ""
        try:
            guest = await self._move(guest, where, path, what, limits)
            self.moved += 1
        except KvmmigError as problem:
            error = f"{type(problem).__name__}: {problem}"
            self.failed += 1
            if what == "move":
                raise Lost(f"move {number} ({where}) failed: {error}") from problem
        await guest.check()
        for left in self._directory.iterdir():
            left.unlink()
        if not self._quiet:
            print(
                f"{number:4} {scheme:5} {what:10} {perf_counter() - begin:6.2f} s  {error or 'moved'}",
                flush=True,
            )
        return guest

    def _policy(self) -> Policy:
        choose = self._random
        return FirstOf(
            choose.choice([DowntimeLimit(0.05), NoProgress(2), DowntimeLimit(0.0)]),
            choose.choice([AutoConverge(first=0.5), MaxRounds(3)]),
            MaxRounds(choose.randint(1, 12)),
        )

    async def _move(self, guest: Guest, where: TransportURI, path: Path, what: str, limits: Limits) -> Guest:
        """The guest where it lives afterwards; a `KvmmigError` when it stayed."""
        after = self._random.uniform(0.0, 0.3)
        source = where
        if what == "cut":
            fault = {"fault.what": "cut", "fault.at": str(self._random.randrange(SIZE))}
            source = replace(where, options={**where.options, **fault}, wrappers=("fault",))
        if where.scheme in ("tcp", "unix"):
            return await self._live(guest, source, where, what, after, limits)
        migration = OutgoingMigration(
            guest.machine, transport_for(source), policy=self._policy(), limits=limits
        )
        problem: KvmmigError | None = None
        async with trio.open_nursery() as nursery:
            if what != "move":
                nursery.start_soon(_cancel_after, after, migration)
            try:
                await migration.run(self._strays)
            except KvmmigError as error:
                problem = error
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem
        saved = TransportURI("exec", f"cat {path}.img") if where.scheme == "exec" else where
        restored = await self._incoming(saved)
        await guest.stack.aclose()
        return restored

    async def _live(
        self,
        guest: Guest,
        source: TransportURI,
        destination: TransportURI,
        what: str,
        after: float,
        limits: Limits,
    ) -> Guest:
        """Both sides at once, and either may be disturbed."""
        received: list[Guest] = []
        problem: KvmmigError | None = None
        other_side = trio.CancelScope()

        async def receive(task_status: trio.TaskStatus[TransportURI]) -> None:
            with other_side, contextlib.suppress(KvmmigError):
                received.append(await self._incoming(destination, task_status.started))

        async with trio.open_nursery() as nursery:
            listening_at: TransportURI = await nursery.start(receive)
            migration = OutgoingMigration(
                guest.machine,
                transport_for(replace(source, target=listening_at.target)),
                policy=self._policy(),
                limits=limits,
            )

            @nursery.start_soon
            async def send() -> None:
                nonlocal problem
                try:
                    await migration.run(self._strays)
                except KvmmigError as error:
                    problem = error
                    other_side.cancel()

            if what == "cancel":
                nursery.start_soon(_cancel_after, after, migration)
            elif what == "peer dies":
                await trio.sleep(after)
                if not received:
                    other_side.cancel()
        if received:
            await guest.stack.aclose()
            return received[0]
        if guest.machine.state is State.MOVED:
            # The other side died in the moment of the hand-over. That it is dead, only the operator can know.
            await guest.machine.resume(force=True)
        raise problem or MigrationError("the other side died as soon as it had the guest")

    async def _incoming(
        self, uri: TransportURI, on_listening: Callable[[TransportURI], None] | None = None
    ) -> Guest:
        letters = bytearray()
        stack = AsyncExitStack()
        incoming = IncomingMigration(
            transport_for(uri),
            output=letters.extend,
            keep_listening=False,
            on_listening=on_listening,
            strays=self._strays,
        )
        machine = await stack.enter_async_context(incoming.machine())
        return Guest(machine, stack, letters)


async def _cancel_after(seconds: float, migration: OutgoingMigration) -> None:
    await trio.sleep(seconds)
    with contextlib.suppress(MigrationError):  # too late: the guest belongs to the other side
        migration.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("kvmmig").addHandler(logging.NullHandler())  # whoever is cut is passed over; we know
    print(f"{arguments.moves} moves, seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        soak = Soak(arguments.seed, Path(directory), quiet=arguments.quiet)
        try:
            trio.run(soak.run, arguments.moves)
        except Lost as error:
            sys.exit(f"LOST: {error} (seed {arguments.seed})")
    print(f"{soak.moved} moved, {soak.failed} did not and went on here; nothing was lost")


if __name__ == "__main__":
    main()
