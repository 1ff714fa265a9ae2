"""How fast does the monitor answer while its machine migrates? ``make monitor``

A script that was written for QEMU's monitor sets ``downtime-limit`` and ``max-bandwidth``, begins a migration
and asks ``query-migrate`` every millisecond until it has ended. Here that script runs against a real machine,
a process of its own, onto several sinks: TCP, a pipe with an I/O helper, a sink of 50 MB/s and one that
stalls. What it measured is printed beside what the same script sees when nothing migrates, in the same run.
Then once more over TCP, while one client pipelines 10,000 commands and another one never reads: what became
of the migration, and of the script's answers, beside what they were alone.

Nothing is asserted: how long an answer takes includes how long this process, and the machine's, waits for a
CPU. Where the host is a virtual machine whose hypervisor takes CPU time away, the worst answer is told apart:
of all answers, and of those around which nothing was stolen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from kvmmig.migration.stall_meter import stolen
from kvmmig.units import format_duration, format_rate, format_size, parse_size

LIMIT = 0.010  # seconds: the worst answer that is allowed on an idle host
PATIENCE = 300.0  # seconds
PIECE = 0.05  # seconds between two looks at what was stolen
FLOOD = 10_000  # commands
ENDS = ("completed", "failed", "cancelled")


class Monitor:
    """A blocking QMP client that does nothing but ask: what it measures is the other side."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode())
        while True:
            message = json.loads(self._lines.readline())
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def pipeline(self, count: int) -> None:
        """So many commands, as fast as they are taken; each must have its answer."""

        def ask() -> None:
            for number in range(count):
                command = "query-name" if number % 2 else "query-status"
                self._socket.sendall(json.dumps({"execute": command, "id": number}).encode())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        answered = 0
        while answered < count:
            message = json.loads(self._lines.readline())
            if "event" not in message:
                if message.get("id") != answered:
                    raise RuntimeError(f"answer {answered} is {message}")
                answered += 1
        asking.join()

    def ask_and_never_read(self) -> None:
        """In the background, until nothing more is taken, or for ever."""
        request = b'{"execute": "query-commands"}' * 100

        def ask() -> None:
            with suppress(OSError):
                while True:
                    self._socket.sendall(request)

        threading.Thread(target=ask, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


def listens(path: Path) -> bool:
    """Whether somebody does: a socket has its name a moment before that."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@contextmanager
def machine(directory: Path, name: str, *arguments: str) -> Iterator[str]:
    """A machine in a process of its own; yields its monitor's socket."""
    path = directory / f"{name}.qmp"
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "kvmmig", "run", *arguments),
                *("--name", name, "--qmp", f"unix:{path}", "--serial", os.devnull),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
        )
    try:
        while not listens(path):
            if process.poll() is not None:
                raise RuntimeError((directory / f"{name}.log").read_text())
            time.sleep(0.01)
        yield str(path)
    finally:
        process.terminate()
        process.wait()
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Sink:
    """Where to. ``{}`` stands for the address of a machine that waits for the guest, or for a file's path."""

    name: str
    uri: str
    listens: bool = True
    cancel_after: float = math.inf  # seconds


SINKS = (
    Sink("TCP", "{}"),
    Sink("pipe and helper", "pipe:{}", listens=False),
    Sink("50 MB/s", "throttle+{}?throttle.rate=50MB/s"),
    Sink("stalled", "fault+{}?fault.what=stall&fault.at=64MiB", cancel_after=5.0),
)


@dataclass
class Answers:
    """How long they took, seconds; how the migration ended, and its own figures."""

    took: list[float] = field(default_factory=list)
    #: For each piece of time: the first answer in it, and the CPU time stolen by its begin.
    pieces: list[tuple[int, float]] = field(default_factory=list)
    status: str = "-"
    total: float = 0.0
    figures: Any = None

    def quantile(self, q: float) -> float:
        return sorted(self.took)[min(int(len(self.took) * q), len(self.took) - 1)]

    @property
    def stolen(self) -> float:
        return self.pieces[-1][1] - self.pieces[0][1]

    @property
    def undisturbed(self) -> list[float]:
        """Those around which nothing was stolen: the kernel counts by 10 ms, and so a piece late."""
        found: list[float] = []
        for number in range(len(self.pieces) - 1):
            around = self.pieces[max(number - 1, 0) : number + 3]
            if around[0][1] == around[-1][1]:
                found += self.took[self.pieces[number][0] : self.pieces[number + 1][0]]
        return found


def poll(monitor: Monitor, seconds: float = math.inf, *, cancel_after: float = math.inf) -> Answers:
    """Ask every millisecond until the migration has ended, or for so long."""
    answers = Answers()
    took = answers.took
    begin = time.perf_counter()
    next_piece = begin
    cancelled = False
    info: Any = {}
    while (now := time.perf_counter()) - begin < min(seconds, PATIENCE):
        if now >= next_piece:
            answers.pieces.append((len(took), stolen()))
            next_piece = now + PIECE
            now = time.perf_counter()
        info = monitor("query-migrate")
        took.append(time.perf_counter() - now)
        if info.get("status") in ENDS:
            break
        if now - begin > cancel_after and not cancelled:
            cancelled = True
            monitor("migrate_cancel")
        time.sleep(0.001)
    answers.pieces.append((len(took), stolen()))
    answers.status = info.get("status", "-")
    answers.total = time.perf_counter() - begin
    answers.figures = monitor("x-kvmmig-query-migration")
    return answers


def disturb(path: str) -> None:
    """Pipeline 10,000 commands, while another client asks for a lot and reads none of it."""
    with Monitor(path) as deaf, Monitor(path) as flooding:
        deaf.ask_and_never_read()
        began = time.perf_counter()
        flooding.pipeline(FLOOD)
        print(f"{FLOOD:,} commands were answered in order in {time.perf_counter() - began:.2f} s", flush=True)
        threading.Event().wait()  # deaf to the end


@contextmanager
def disturbed(path: str) -> Iterator[subprocess.Popen[bytes]]:
    """In a process of its own, so that it does not share this one's lock."""
    process = subprocess.Popen([sys.executable, __file__, "--disturb", path])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def where_it_listens(path: str) -> str:
    with Monitor(path) as monitor:
        while "socket-address" not in (info := monitor("query-migrate")):
            time.sleep(0.01)
    address = info["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


def measure(
    directory: Path, sink: Sink, guest: Sequence[str], idle: float, *, others: bool = False
) -> tuple[Answers, Answers]:
    """The same machine when idle, and while it moves to the sink; beside ``others``, if so."""
    with ExitStack() as stack:
        target = str(directory / "guest.img")
        if sink.listens:
            there = stack.enter_context(machine(directory, "there", "--incoming", "tcp:127.0.0.1:0"))
            target = where_it_listens(there)
        here = stack.enter_context(machine(directory, "here", *guest))
        monitor = stack.enter_context(Monitor(here))
        monitor("migrate-set-parameters", downtime_limit=300, max_bandwidth=0)
        time.sleep(0.5)
        before = poll(monitor, idle)
        monitor("migrate", uri=sink.uri.format(target))
        if others:
            stack.enter_context(disturbed(here))
        return before, poll(monitor, cancel_after=sink.cancel_after)


def compared(alone: Answers, beside: Answers) -> Table:
    """What the migration and the script's answers were alone, and beside the others."""
    table = Table(title=f"TCP, beside a client that pipelines {FLOOD:,} commands and one that never reads")
    for column in ("", "alone", "beside them", "share"):
        table.add_column(column, justify="left" if not column else "right")

    def row(what: str, figure: Callable[[Answers], float], show: Callable[[float], str]) -> None:
        one, other = figure(alone), figure(beside)
        table.add_row(what, show(one), show(other), f"{other / one:.0%}")

    row("first round", lambda it: it.figures["rounds"][0]["rate"], format_rate)
    row("the migration", lambda it: it.figures["total-time"], format_duration)
    row("downtime", lambda it: it.figures["downtime"], format_duration)
    row("worst stall", lambda it: it.figures["worst-stall"], format_duration)
    row("an answer, median", lambda it: it.quantile(0.5), format_duration)
    row("an answer, p99", lambda it: it.quantile(0.99), format_duration)
    return table


def cells(answers: Answers) -> Iterator[str]:
    """A row's, behind its name."""
    yield str(len(answers.took))
    yield format_duration(max(answers.took))
    yield format_duration(answers.quantile(0.99))
    yield format_duration(answers.quantile(0.999))
    yield format_duration(answers.stolen)
    calm = answers.undisturbed
    yield f"{len(calm) / len(answers.took):.0%}"
    worst = max(calm, default=math.nan)
    yield "-" if not calm else format_duration(worst) + (" [bold]![/bold]" if worst >= LIMIT else "")
    stall = answers.figures.get("worst-stall")
    yield "-" if stall is None else format_duration(stall)
    yield answers.status
    yield format_duration(answers.total)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the monitor answers while its machine migrates.")
    parser.add_argument("--memory", default="1GiB", help="the guest's, such as 1GiB")
    parser.add_argument("--hot", default="64MiB", help="what the guest writes all the while, such as 64MiB")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds that an idle machine is asked for")
    parser.add_argument("--directory", default="/var/tmp", help="where the saved guest goes: a real disk")
    parser.add_argument("--disturb", metavar="SOCKET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.disturb:
        disturb(options.disturb)
        return
    guest = ("dirtier", "--memory", options.memory, "--set", f"hot={options.hot}")

    table = Table(
        title=f"query-migrate, asked every millisecond: {format_size(parse_size(options.memory))} guest that "
        f"writes {options.hot} all the while"
    )
    for column in (
        "sink",
        "answers",
        "worst",
        "p99",
        "p99.9",
        "stolen",
        "else",
        "worst",
        "stall",
        "ended",
        "in",
    ):
        table.add_column(column, justify="left" if column in ("sink", "ended") else "right")
    moved: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory(prefix="kvmmig-", dir=options.directory) as directory:
        for sink in SINKS:
            before, moved[sink.name] = measure(Path(directory), sink, guest, options.idle)
            table.add_row(f"{sink.name}: idle before", *cells(before))
            table.add_row(sink.name, *cells(moved[sink.name]))
            table.add_section()
        _, beside = measure(Path(directory), SINKS[0], guest, 0.0, others=True)
    console = Console(width=120)
    console.print(table)
    console.print(
        "stolen: CPU time that this host's hypervisor took away; else: answers around which it took none, "
        f"and the worst of them (at most {format_duration(LIMIT)}); stall: the machine's own worst turn.\n"
    )
    console.print(compared(moved[SINKS[0].name], beside))


if __name__ == "__main__":
    main()
