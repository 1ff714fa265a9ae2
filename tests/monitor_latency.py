"""How fast does the monitor answer while its machine migrates? ``make monitor``

A script that was written for QEMU's monitor sets ``downtime-limit`` and ``max-bandwidth``, begins a migration
and asks ``query-migrate`` every millisecond until it has ended. Here that script runs against a real machine,
a process of its own, onto several sinks: TCP, a pipe with an I/O helper, a sink of 50 MB/s and one that
stalls. What it measured is printed beside what the same script sees when nothing migrates, in the same run.

Nothing is asserted: how long an answer takes includes how long this process, and the machine's, waits for a
CPU.
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
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from kvmmig.units import format_duration, format_size, parse_size

LIMIT = 0.010  # seconds: the worst answer that is allowed on an idle host
PATIENCE = 300.0  # seconds
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


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
        while not path.exists():
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


@dataclass(frozen=True)
class Answers:
    """How long they took, seconds; how the migration ended, and what it says of its own event loop."""

    took: Sequence[float]
    status: str = "-"
    total: float = 0.0
    stall: float | None = None

    def quantile(self, q: float) -> float:
        return sorted(self.took)[min(int(len(self.took) * q), len(self.took) - 1)]


def poll(monitor: Monitor, seconds: float = math.inf, *, cancel_after: float = math.inf) -> Answers:
    """Ask every millisecond until the migration has ended, or for so long."""
    took: list[float] = []
    begin = time.perf_counter()
    cancelled = False
    info: Any = {}
    while (now := time.perf_counter()) - begin < min(seconds, PATIENCE):
        info = monitor("query-migrate")
        took.append(time.perf_counter() - now)
        if info.get("status") in ENDS:
            break
        if now - begin > cancel_after and not cancelled:
            cancelled = True
            monitor("migrate_cancel")
        time.sleep(0.001)
    figures = monitor("x-kvmmig-query-migration")
    return Answers(took, info.get("status", "-"), time.perf_counter() - begin, figures.get("worst-stall"))


def where_it_listens(path: str) -> str:
    with Monitor(path) as monitor:
        while "socket-address" not in (info := monitor("query-migrate")):
            time.sleep(0.01)
    address = info["socket-address"][0]
    return f"tcp:{address['host']}:{address['port']}"


def measure(directory: Path, sink: Sink, guest: Sequence[str], idle: float) -> tuple[Answers, Answers]:
    """The same machine when idle, and while it moves to the sink."""
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
        return before, poll(monitor, cancel_after=sink.cancel_after)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the monitor answers while its machine migrates.")
    parser.add_argument("--memory", default="1GiB", help="the guest's, such as 1GiB")
    parser.add_argument("--hot", default="64MiB", help="what the guest writes all the while, such as 64MiB")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds that an idle machine is asked for")
    parser.add_argument("--directory", default="/var/tmp", help="where the saved guest goes: a real disk")
    options = parser.parse_args()
    guest = ("dirtier", "--memory", options.memory, "--set", f"hot={options.hot}")

    table = Table(
        title=f"query-migrate, asked every millisecond: {format_size(parse_size(options.memory))} guest that "
        f"writes {options.hot} all the while"
    )
    for column in ("sink", "answers", "worst", "p99", "p99.9", "own worst stall", "ended", "in"):
        table.add_column(column, justify="left" if column in ("sink", "ended") else "right")
    with tempfile.TemporaryDirectory(prefix="kvmmig-", dir=options.directory) as directory:
        for sink in SINKS:
            before, answers = measure(Path(directory), sink, guest, options.idle)
            for name, one in ((f"{sink.name}: idle before", before), (sink.name, answers)):
                worst = max(one.took)
                mark = "" if worst < LIMIT else " [bold]over 10 ms[/bold]"
                table.add_row(
                    name,
                    str(len(one.took)),
                    format_duration(worst) + mark,
                    format_duration(one.quantile(0.99)),
                    format_duration(one.quantile(0.999)),
                    "-" if one.stall is None else format_duration(one.stall),
                    one.status,
                    format_duration(one.total),
                )
            table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
