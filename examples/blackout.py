"""Why a virtual machine monitor fell silent while it saved a guest, and what cures it.

    python examples/blackout.py [--load] [--sweep] [--memory 64MiB] [--pages 1] [--directory /var/tmp]

A guest that never stops writing is saved in several ways, through the same pipe and helper process or into
a regular file. All of them send the same rounds of the same stream. They differ in where one *step* ends:

a  the unbounded step: on EAGAIN, or when all that is dirty has been sent. No VMM should have it
b  the same step, and its cure: it also ends after 10 ms
c  the unbounded step again, in a thread of its own
k  kvmmig itself: a trio cancel scope around each step, large writes, and for files worker threads

Meanwhile the stall meter times the turns of the event loop, and a monitor wants to answer every 10 ms. What
it all means is told in docs/blackout.md. ``--load`` does everything again on a busy host.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import trio
from rich.console import Console
from rich.table import Table

from kvmmig import Machine, MachineConfig, OutgoingMigration, guests, receive, stream
from kvmmig.errors import KvmmigError, MigrationError
from kvmmig.machine.pageset import Batch, PageSet, runs_of
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.migration.stall_meter import Durations, Histogram, StallMeter
from kvmmig.transport import TransportURI, transport_for
from kvmmig.units import format_duration, format_size, parse_size
from kvmmig_transports import iohelper

ROUNDS = 3  # with the guest running; then the final pass
HEADINGS = ("steps", "EAGAIN", "p50", "p99", "worst", "turn p99", "worst", "monitor", "total", "saved")
EDGES = (0.0001, 0.001, 0.005, 0.015, 0.1, 1.0, 10.0, math.inf)  # of the histograms' rows, in seconds

HOG = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
WRITER = """
import mmap, os, sys
block = mmap.mmap(-1, 4 << 20)
fd = os.open(sys.argv[2], os.O_WRONLY | os.O_TMPFILE | os.O_DIRECT, 0o600)
while os.getppid() == int(sys.argv[1]):
    for offset in range(0, 256 << 20, len(block)):
        os.pwrite(fd, block, offset)
"""


@dataclass(frozen=True)
class Variant:
    sink: str  # pipe or file
    letter: str  # as in the list above
    says: str
    pages: int = 1  # that one write carries; kvmmig decides for itself

    @property
    def bound(self) -> float:
        """What ends a step whatever the sink does, in seconds."""
        return Limits().step if self.letter == "b" else math.inf


@dataclass(frozen=True)
class Result:
    """What one save was like; seconds and bytes."""

    variant: Variant
    eagains: str
    steps: Durations
    turns: Durations
    latency: float
    total: float
    sent: int


class Save:
    """A save by the parts of kvmmig, but with a step of its own."""

    def __init__(self, machine: Machine, fd: int, variant: Variant) -> None:
        self._machine = machine
        self._fd = fd
        self._variant = variant
        self._pending = PageSet(machine.memory.n_pages)
        self._batches: Iterator[Batch] = iter(())
        self._cursor = stream.Cursor()
        self._encoder = stream.Encoder(stream.Direction.FORWARDS)
        self.steps = Histogram()
        self.eagains = 0

    def step(self) -> Literal["done", "full", "late"]:
        """Write page after page. What is shown is this alone, and its cure is the line with the bound."""
        begin = perf_counter()
        try:
            while perf_counter() - begin < self._variant.bound:
                if self._cursor.empty and not self._put_next():
                    return "done"
                try:
                    self._cursor.advance(os.writev(self._fd, self._cursor.head()))
                except BlockingIOError:  # EAGAIN; a regular file never says so
                    self.eagains += 1
                    return "full"
            return "late"
        finally:
            self.steps.add(perf_counter() - begin)

    async def _send(self) -> None:
        """Send what the cursor holds and all that is pending, in steps."""
        self._batches = self._pending.batches(self._variant.pages)
        while True:
            threaded = self._variant.letter == "c"
            outcome = await trio.to_thread.run_sync(self.step) if threaded else self.step()
            if outcome == "done":
                return
            if outcome == "full":
                await trio.lowlevel.wait_writable(self._fd)
            await trio.lowlevel.checkpoint()  # here the loop turns, and only here

    def _put_next(self) -> bool:
        batch = next(self._batches, None)
        if batch is None:
            return False
        if len(batch.pages):
            runs = runs_of(batch.pages)
            pages = [self._machine.memory.pages(first, count) for first, count in runs.tolist()]
            self._cursor.put(*self._encoder.page_runs(runs, pages))
        self._cursor.put(accepted=lambda: self._pending.discard(batch.first, batch.stop - batch.first))
        return True

    async def run(self) -> int:
        """Save the guest, which goes on running. Returns the stream's length in bytes."""
        machine, encoder, tracker = self._machine, self._encoder, self._machine.dirty_tracker()
        self._cursor.put(encoder.preamble())
        self._cursor.put(encoder.hello(machine.memory.n_pages, machine.description.encode()))
        await trio.to_thread.run_sync(tracker.start)
        for _ in range(ROUNDS):
            await trio.to_thread.run_sync(tracker.collect, self._pending)
            await self._send()
        await machine.pause()
        sections = await machine.capture()
        await trio.to_thread.run_sync(tracker.collect, self._pending)
        await self._send()
        for one in sections:
            self._cursor.put(encoder.section(stream.Section(one.name, one.version, one.data)))
        self._cursor.put(encoder.end(running=True) + encoder.signal(stream.Kind.GO))
        await self._send()
        await trio.to_thread.run_sync(tracker.stop)
        await machine.resume()
        if self._pending or encoder.pages < machine.memory.n_pages:
            raise MigrationError(f"{self._variant.says}: not every page was sent")
        return self._cursor.accepted


def start_helper(path: str, fd: int) -> tuple[subprocess.Popen[bytes], int]:
    """kvmmig's own helper, and our end of a pipe to it, set up as kvmmig does."""
    command = [sys.executable, "-I", "-S", iohelper.__file__, path, str(fd)]
    helper = subprocess.Popen(
        command, stdin=subprocess.PIPE, bufsize=0, pass_fds=[fd], start_new_session=True, pipesize=1 << 20
    )
    assert helper.stdin is not None
    os.set_blocking(helper.stdin.fileno(), False)
    return helper, helper.stdin.fileno()


@asynccontextmanager
async def sink_for(kind: str, path: str) -> AsyncIterator[int]:
    """What is written to: the file itself, or the pipe to a helper that writes it. On the disk at the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if kind == "pipe" else 0)
    fd = await trio.to_thread.run_sync(os.open, path, flags, 0o600)
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        if kind == "file":
            yield fd
            await trio.to_thread.run_sync(os.fdatasync, fd)
            return
        helper, pipe = await trio.to_thread.run_sync(start_helper, path, fd)
        stack.enter_context(helper)
        stack.callback(helper.kill)
        yield pipe
        await trio.to_thread.run_sync(helper.communicate)  # closes the pipe, waits for the end
        if helper.returncode:
            raise MigrationError(f"the I/O helper ended with status {helper.returncode}")


async def monitor(lateness: list[float]) -> None:
    """Wants to answer every 10 ms, and writes down by how many seconds it was late."""
    due = math.inf
    try:
        while True:
            due = trio.current_time() + 0.010
            await trio.sleep_until(due)
            lateness.append(trio.current_time() - due)
    finally:
        lateness.append(trio.current_time() - due)


async def save(machine: Machine, variant: Variant, path: str) -> Result:
    """Save the guest in one way, measure, and see that the file is whole. The guest runs afterwards."""
    transport = transport_for(TransportURI(variant.sink, path))  # the first one of its kind is imported here
    lateness: list[float] = []
    begin = perf_counter()
    with StallMeter() as meter:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor, lateness)
            if variant.letter == "k":
                figures = await OutgoingMigration(machine, transport, policy=MaxRounds(ROUNDS)).run()
                sent, eagains, steps = figures.sent_bytes, "–", figures.steps
            else:
                async with sink_for(variant.sink, path) as fd:
                    own = Save(machine, fd, variant)
                    sent = await own.run()
                eagains, steps = str(own.eagains), own.steps.snapshot()
                if (size := await trio.to_thread.run_sync(os.path.getsize, path)) != sent:
                    raise MigrationError(f"{variant.says}: {sent} bytes were sent, but the file has {size}")
            nursery.cancel_scope.cancel()
    total = perf_counter() - begin
    if variant.letter == "k":
        await machine.resume(force=True)  # the file is only looked at when this machine is gone
    return Result(variant, eagains, steps, meter.turns.snapshot(), max(lateness), total, sent)


@contextmanager
def load(directory: str) -> Iterator[None]:
    """A busy loop on each CPU, and a process that writes to the disk without the page cache."""
    with ExitStack() as stack:
        # They end with this process even if it is killed, and a terminal's Ctrl-C is not for them.
        for program in [*[HOG] * (os.cpu_count() or 1), WRITER]:
            command = [sys.executable, "-I", "-S", "-c", program, str(os.getpid()), directory]
            process = stack.enter_context(subprocess.Popen(command, start_new_session=True))
            stack.callback(process.kill)
        yield


async def restore(path: str) -> str:
    """Let a saved guest run on, stop it, and compare every page with what it must hold."""
    async with receive(transport_for(TransportURI("file", path))) as copy:
        await copy.pause()
        check = await trio.to_thread.run_sync(guests.check_machine, copy)
    if check is None or not check.ok:
        raise MigrationError(f"{path} does not hold the guest as it was: {check and check.summary}")
    return check.summary


def median(durations: Durations) -> float:
    rank = math.ceil(durations.count / 2)
    for upper, count in durations.buckets:
        rank -= count
        if rank <= 0:
            return min(upper, durations.worst)
    return 0.0


def show_figures(console: Console, title: str, results: list[Result]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("variant", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for one in results:
        times = (median(one.steps), one.steps.p99, one.steps.worst, one.turns.p99, one.turns.worst)
        table.add_row(
            f"{one.variant.sink} {one.variant.letter}: {one.variant.says}",
            str(one.steps.count),
            one.eagains,
            *map(format_duration, (*times, one.latency, one.total)),
            format_size(one.sent),
        )
    console.print(table)


def show_histogram(console: Console, title: str, results: list[Result], times: list[Durations]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    for one in results:
        table.add_column(f"{one.variant.sink} {one.variant.letter}", no_wrap=True)
    for low, high in zip((0.0, *EDGES), EDGES, strict=False):
        counts = [sum(n for upper, n in one.buckets if low < upper <= high) for one in times]
        bars = [f"{'▇' * (1 + int(math.log10(n)))} {n}" if n else "" for n in counts]
        table.add_row(f"up to {format_duration(high)}" if high < math.inf else "more", *bars)
    console.print(table)


def variants(pages: int, sweep: bool) -> list[Variant]:
    if sweep:
        return [Variant("pipe", "a", f"pages a write: {n}", n) for n in (1, 2, 4, 8, 16, 64, 1024)]
    ways = (("a", "a step until EAGAIN"), ("b", "the same, 10 ms at most"), ("c", "as a, in a thread"))
    piped = [Variant("pipe", letter, says, pages) for letter, says in ways]
    filed = [Variant("file", letter, says, pages) for letter, says in ways[:2]]
    return [*piped, Variant("pipe", "k", "kvmmig, pipe:"), *filed, Variant("file", "k", "kvmmig, file:")]


async def main(arguments: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    memory = parse_size(arguments.memory)
    if not 1 <= arguments.pages <= stream.MAX_FRAME_PAGES:
        raise ValueError(f"a write can't carry {arguments.pages} pages; write --pages 1 to 1024")
    program = guests.find("dirtier").program(memory=memory, cpus=1, settings={"hot": "1MiB"})
    config = MachineConfig(memory=memory, name=program.name, parameters=program.parameters)
    ways = variants(arguments.pages, arguments.sweep)
    token, filled = trio.lowlevel.current_trio_token(), trio.Event()
    restored: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory(prefix="blackout-", dir=arguments.directory) as directory:
        async with Machine.open(config, output=lambda data: token.run_sync_soon(filled.set)) as machine:
            await machine.load(program)
            await machine.start()
            await filled.wait()  # it prints once it has filled its memory
            for situation in ("no load of its own", "CPU and disk load")[: 1 + arguments.load]:
                results = []
                with load(directory) if "CPU" in situation else ExitStack():
                    for way in ways:
                        path = f"{directory}/{way.sink}-{way.letter}"
                        results.append(await save(machine, way, path))
                        if way.letter in "bk":
                            restored[path] = way
                show_figures(console, f"{arguments.memory}, {os.cpu_count()} CPUs, {situation}", results)
                if not arguments.sweep:
                    show_histogram(console, f"steps, {situation}", results, [one.steps for one in results])
                    turns = [one.turns for one in results]
                    show_histogram(console, f"turns of the loop, {situation}", results, turns)
        for path, way in restored.items():
            console.print(f"restored from {way.sink} {way.letter}: {await restore(path)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a save's step does to the event loop.")
    parser.add_argument("--memory", default="64MiB", help="of the guest (64MiB)")
    parser.add_argument("--pages", type=int, default=1, help="that one write carries (1)")
    parser.add_argument("--load", action="store_true", help="everything again, under CPU and disk load")
    parser.add_argument("--sweep", action="store_true", help="only a, with writes of 1 to 1024 pages")
    parser.add_argument("--directory", default="/var/tmp", help="where the files go (/var/tmp)")
    problem = ""
    try:
        trio.run(main, parser.parse_args())
    except* KeyboardInterrupt:
        problem = "stopped; nothing is left behind"
    except* (KvmmigError, OSError, ValueError) as group:
        problem = str(group.exceptions[0])
    sys.exit(problem or 0)
