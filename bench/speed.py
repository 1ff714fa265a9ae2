"""The figures that kvmmig is held to, each beside its limit, measured in the same run: ``make bench``.

Nothing here is asserted: a busy machine makes every figure worse. What is compared is compared within this
run, and the raw peers (a plain send/recv loop, plain O_DIRECT writes) run right before what they are
compared with.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import trio
from rich.console import Console
from rich.table import Table

from kvmmig import guests
from kvmmig.machine import Machine, MachineConfig
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.report import MigrationStatistics
from kvmmig.transport import TransportURI, transport_for
from kvmmig.units import format_duration, format_rate, format_size

MIB = 1 << 20
BLOCK = 4 * MIB
SEND = MIB


@dataclass
class Row:
    what: str
    measured: str
    limit: str
    verdict: str


def verdict(good: bool, text: str = "") -> str:
    return f"{text} {'reached' if good else '[bold]missed[/bold]'}".strip()


# -- the peers -------------------------------------------------------------------------------------------

_RECEIVER = """
import mmap, socket, sys
buffer = mmap.mmap(-1, int(sys.argv[2]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
buffer.madvise(mmap.MADV_HUGEPAGE)
view = memoryview(buffer)
for at in range(0, len(buffer), 4096):
    buffer[at] = 1
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.send(b"!")
done = 0
while done < len(buffer):
    done += sock.recv_into(view[done:done + (1 << 20)])
sock.send(b"!")
"""


def filled(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    noise = os.urandom(MIB)
    for at in range(0, size, MIB):
        memory[at : at + MIB] = noise
    return memory


def plain_tcp(size: int) -> float:
    """Bytes a second of blocking 1 MiB sends to a process that receives into memory it has touched."""
    memory = memoryview(filled(size))
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", _RECEIVER, str(server.getsockname()[1]), str(size)]
        with subprocess.Popen(command) as receiver:
            sock, _ = server.accept()
            with sock:
                sock.recv(1)
                begin = perf_counter()
                for at in range(0, size, SEND):
                    sock.sendall(memory[at : at + SEND])
                sock.recv(1)
                took = perf_counter() - begin
            receiver.wait()
    return size / took


def plain_direct(path: Path, size: int) -> float:
    """Bytes a second of 4 MiB O_DIRECT writes one after the other, fdatasync included."""
    memory = memoryview(filled(BLOCK))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        begin = perf_counter()
        for at in range(0, size, BLOCK):
            os.pwrite(fd, memory, at)
        os.fdatasync(fd)
        return size / (perf_counter() - begin)
    finally:
        os.close(fd)
        path.unlink()


def lost_cpu(seconds: float = 3.0) -> float:
    """The longest copy of 256 KiB, which takes some 30 us, beside as many busy processes as there are CPUs.

    What the kernel's scheduler alone does to a thread that is busy itself, as an event loop is that moves a
    guest while the guest and the other side are busy too.
    """
    hog = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
    hogs = [
        subprocess.Popen([sys.executable, "-c", hog, str(os.getpid())]) for _ in range(os.cpu_count() or 1)
    ]
    try:
        source, target = bytes(1 << 18), bytearray(1 << 18)
        worst, end = 0.0, perf_counter() + seconds
        while (begin := perf_counter()) < end:
            target[:] = source
            worst = max(worst, perf_counter() - begin)
        return worst
    finally:
        for process in hogs:
            process.kill()
            process.wait()


# -- the product ------------------------------------------------------------------------------------------


@asynccontextmanager
async def dirtier(size: int) -> AsyncIterator[Machine]:
    """A dirtier, its hot set 64 MiB and rewritten flat out, that has filled its memory and runs."""
    program = guests.find("dirtier").program(memory=size, cpus=1, settings={"hot": "64MiB"})
    letter, token = trio.Event(), trio.lowlevel.current_trio_token()

    def output(_: bytes) -> None:  # called in the vCPU's thread
        token.run_sync_soon(letter.set, idempotent=True)

    config = MachineConfig(memory=size, name="dirtier", parameters=program.parameters)
    async with Machine.open(config, output=output) as machine:
        await machine.load(program)
        await machine.start()
        with trio.fail_after(120):
            await letter.wait()
        yield machine


@contextmanager
def destination() -> Iterator[str]:
    """A kvmmig process that waits for a guest; yields where."""
    command = [
        sys.executable,
        "-m",
        "kvmmig",
        "run",
        "--incoming",
        "tcp:127.0.0.1:0",
        "--serial",
        "/dev/null",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        match = re.search(r"tcp:127\.0\.0\.1:\d+", process.stderr.readline())
        assert match is not None
        try:
            yield match[0]
        finally:
            process.terminate()
            process.communicate()


async def over_tcp(size: int, *, running: bool) -> MigrationStatistics:
    async with dirtier(size) as machine:
        # Two cores: a guest that runs takes one of them from the stream, and the peer has none.
        if not running:
            await machine.pause()
        with destination() as uri:
            return await OutgoingMigration(machine, uri).run()


async def to_disk(uri: TransportURI, size: int) -> MigrationStatistics:
    async with dirtier(size) as machine:
        await machine.pause()
        return await OutgoingMigration(machine, transport_for(uri)).run()


_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def source_memory(size: int) -> int:
    """The peak resident size, in bytes, of a process that runs a guest and migrates it."""
    with destination() as uri:
        command = [sys.executable, "-m", "kvmmig", "run", "dirtier", "--memory", str(size), "--serial"]
        told = subprocess.run(
            # By way of a small process: a peak begins with that of whoever starts it, and this is a large one
            [sys.executable, "-c", _PEAK, *command, "/dev/null", "--migrate-to", uri, "--after", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return int(told.stdout) * 1024


def median(call: Callable[[], float], runs: int) -> float:
    return statistics.median(call() for _ in range(runs))


async def measured(
    call: Callable[[], Awaitable[MigrationStatistics]], runs: int
) -> list[MigrationStatistics]:
    return [await call() for _ in range(runs)]


def compare(what: str, rates: list[float], plain: float, limit: float | None) -> Row:
    rate = statistics.median(rates)
    ratio = rate / plain
    if limit is None:
        return Row(what, format_rate(rate), f"beside {format_rate(plain)}", f"{ratio:.0%}")
    return Row(
        what,
        format_rate(rate),
        f">= {limit:.0%} of {format_rate(plain)}",
        verdict(ratio >= limit, f"{ratio:.0%}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of guest memory")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--directory", default="/var/tmp", help="where to write")
    arguments = parser.parse_args()
    size, runs = arguments.memory * MIB, arguments.runs
    console = Console()
    rows: list[Row] = []
    everything: list[MigrationStatistics] = []

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        image = Path(directory, "guest.img")

        console.print("plain TCP, then round 0 of a migration over TCP ...")
        plain = median(lambda: plain_tcp(size), runs)
        figures = trio.run(measured, lambda: over_tcp(size, running=False), runs)
        rows.append(compare("TCP, round 0", [one.rounds[0].rate for one in figures], plain, 0.60))
        everything += figures

        console.print("plain O_DIRECT writes, then a save by file: and one by pipe: ...")
        plain = median(lambda: plain_direct(image, size), runs)
        for scheme in ("file", "pipe"):
            figures = trio.run(measured, partial(to_disk, TransportURI(scheme, str(image)), size), runs)
            rates = [one.sent_bytes / (one.total_time - (one.setup_time or 0)) for one in figures]
            limit = 0.70 if scheme == "file" else None  # a pipe costs two copies more
            rows.append(compare(f"{scheme}: with O_DIRECT, durable", rates, plain, limit))
            everything += figures

        console.print("a 64 MiB hot set rewritten flat out, over TCP ...")
        figures = trio.run(measured, lambda: over_tcp(size, running=True), runs)
        everything += figures
        downtime = statistics.median(one.downtime or 0.0 for one in figures)
        rows.append(
            Row(
                "downtime, hot set flat out", format_duration(downtime), "<= 100 ms", verdict(downtime <= 0.1)
            )
        )

    # Where this host is a virtual machine, its hypervisor may take the CPUs away; the kernel counts that.
    quiet = [one for one in everything if not one.stolen]
    bound = everything[0].step_bound + 0.005
    for what, limit, of in (
        ("worst step", bound, lambda one: one.steps.worst),
        ("worst turn of the loop", 0.010, lambda one: one.worst_stall),
    ):
        worst = max(map(of, quiet), default=None)
        where = f"in {len(quiet)} of {len(everything)} runs, from which no CPU time was stolen"
        if worst is None:
            rows.append(Row(f"{what}, {where}", "-", f"<= {limit * 1000:g} ms", "this host is not idle"))
        else:
            text, good = format_duration(worst), verdict(worst <= limit)
            rows.append(Row(f"{what}, {where}", text, f"<= {limit * 1000:g} ms", good))
        rows.append(Row(f"{what}, in all runs", format_duration(max(map(of, everything))), "", ""))
    taken = sum(one.stolen or 0.0 for one in everything)
    rows.append(Row("stolen by this host's hypervisor", format_duration(taken), "", ""))

    console.print("a plain thread that copies, beside busy ones ...")
    lost = lost_cpu()
    rows.append(Row("worst copy of a plain thread", format_duration(lost), "the host's own", ""))

    console.print("memory of the source process ...")
    extra = source_memory(size) - size
    rows.append(
        Row("source's memory beyond the guest", format_size(extra), "<= 100 MiB", verdict(extra <= 100 * MIB))
    )

    table = Table(title=f"kvmmig, {format_size(size)} guests, median of {runs} runs")
    for name in ("figure", "measured", "limit", ""):
        table.add_column(name)
    for row in rows:
        table.add_row(row.what, row.measured, row.limit, row.verdict)
    console.print(table)


if __name__ == "__main__":
    main()
