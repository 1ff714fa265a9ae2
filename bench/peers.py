"""kvmmig beside QEMU: the same guest, the same moves, the same driver through both monitors: ``make peers``.

Both are processes that a QMP client starts, moves and asks; nothing in kvmmig knows of this. The moves of
all peers are interleaved, so that a host that changes changes for all. Before each row the limits are taken
under the same load: a plain blocking socket loop, plain O_DIRECT writes, and what a bare event loop waits
for its turn. What a table says was seen from outside:

- *total*: from the command ``migrate`` to the event ``completed``; for a file until it is synced, where the
  peer doesn't do that itself;
- *downtime*: from the source's event STOP to the destination's RESUME; for what is stored, to the end of
  *total*;
- *answer*: the slowest ``query-status`` while it moved, on a connection of its own;
- *CPU*: seconds of both processes and their helpers, without what the guest used, a GB of guest;
- *restore*: from starting the process to the guest's next letter on its serial port.

QEMU's memory is preallocated. A guest of `peers.asm` has random bytes everywhere and rewrites ``--hot`` of
them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.speed import plain_direct, plain_tcp
from kvmmig.errors import KvmmigError
from kvmmig.units import format_duration, format_rate, format_size, parse_size

MIB = 1 << 20
SECTOR = Path(__file__).with_suffix(".asm")
#: Where RAM has no hole yet, on both peers' machines.
MOST = 3 << 30
PATIENCE = 300.0


class PeerError(Exception):
    """A peer did not do what it was asked to; the text says which and what."""


# -- QMP ---------------------------------------------------------------------------------------------------


class Qmp:
    """One blocking connection. Events are kept, each with its own timestamp in seconds."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._replies.get(timeout=PATIENCE)  # the greeting
        self("qmp_capabilities")

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            for line in self._lines:
                message = json.loads(line)
                (self.events if "event" in message else self._replies).put(message)
        self._replies.put(None)

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        reply = self._replies.get(timeout=PATIENCE)
        if reply is None:
            raise PeerError(f"{command}: the monitor closed the connection")
        if "error" in reply:
            raise PeerError(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def wait(self, name: str, **data: str) -> float:
        """When the next such event was; others before it are lost."""
        while True:
            try:
                event = self.events.get(timeout=PATIENCE)
            except queue.Empty:
                raise PeerError(f"no event {name} within {PATIENCE:g} s") from None
            if event["event"] == "MIGRATION" and event["data"]["status"] == "failed" != data.get("status"):
                raise PeerError("the migration failed")
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                stamp = event["timestamp"]
                return float(stamp["seconds"] + stamp["microseconds"] / 1e6)

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Asker:
    """Asks ``query-status`` every 5 ms, and keeps the slowest answer, in seconds."""

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._over = threading.Event()
        self.worst = 0.0
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with suppress(OSError, PeerError, queue.Empty):
            while not self._over.wait(0.005):
                begin = time.perf_counter()
                self._qmp("query-status")
                self.worst = max(self.worst, time.perf_counter() - begin)

    def end(self) -> float:
        self._over.set()
        self._thread.join()
        return self.worst


# -- the peers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a peer does a row: a URI with {port} or {path} in it, and what is set before."""

    uri: str
    capabilities: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    synced: bool = True  # what is complete is on the disk


class Vmm:
    """A process with a machine and two monitors; it ends with its block."""

    name = ""
    ways: Mapping[str, Way] = {}

    def __init__(self, bench: Bench, *, incoming: str = "", defer: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="peer-")
        here = Path(self._directory.name)
        self._serial = here / "serial"
        self._serial.touch()
        log = (here / "log").open("w")
        self._log = here / "log"
        command = self.command(bench, here, "defer" if defer else incoming)
        self.started = time.perf_counter()
        # A package that is installed comes with its bytecode; a clone writes it at its first run.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        log.close()
        self.qmp, self.asked = (Qmp(self._socket(here / name)) for name in ("a", "b"))
        self.qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def command(self, bench: Bench, here: Path, incoming: str) -> list[str]:
        raise NotImplementedError

    def _socket(self, path: Path) -> Path:
        end = time.monotonic() + PATIENCE
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise PeerError(f"{self.name} did not start: {self._log.read_text().strip()}")
            time.sleep(0.001)
        time.sleep(0.001)  # it listens a moment after it is there
        return path

    def prepare(self, way: Way) -> None:
        if way.capabilities:
            on = [{"capability": name, "state": True} for name in way.capabilities]
            self.qmp("migrate-set-capabilities", capabilities=on)
        if way.parameters:
            self.qmp("migrate-set-parameters", **way.parameters)

    def wait_memory(self, size: int) -> None:
        """Until a destination has its memory: an operator who has it ready before is what is compared."""
        end = time.monotonic() + PATIENCE
        status = Path(f"/proc/{self.process.pid}/status")
        while int(status.read_text().partition("VmRSS:")[2].split()[0]) << 10 < size:
            if self.process.poll() is not None or time.monotonic() > end:
                raise PeerError(f"{self.name} has not got its memory: {self._log.read_text().strip()}")
            time.sleep(0.01)

    def letters(self) -> int:
        return self._serial.stat().st_size

    def wait_letter(self, beyond: int) -> None:
        end = time.monotonic() + PATIENCE
        while self.letters() <= beyond:
            if self.process.poll() is not None or time.monotonic() > end:
                raise PeerError(f"{self.name}: the guest says nothing: {self._log.read_text().strip()}")
            time.sleep(0.0005)

    def cpu(self) -> float:
        """Seconds of this process and its children, gone ones too, without the guest's."""
        total, tick = 0.0, os.sysconf("SC_CLK_TCK")
        for pid in [self.process.pid, *_children(self.process.pid)]:
            with suppress(OSError):
                numbers = [
                    int(n) for n in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1:]
                ]
                # utime, stime, cutime, cstime, guest_time; see proc(5), where the state is field 3
                total += (sum(numbers[10:14]) - numbers[39]) / tick
        return total

    def __enter__(self) -> Vmm:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self.asked.close()
        for pid in _children(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()


def _children(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


_LIMITS = {"downtime-limit": 300, "max-bandwidth": 1 << 40}


class Kvmmig(Vmm):
    name = "kvmmig"
    ways = {  # noqa: RUF012
        "tcp": Way("tcp:127.0.0.1:{port}?lanes=4", parameters=_LIMITS),
        "file": Way("file:{path}", parameters=_LIMITS),
        "pipe": Way("pipe:{path}", parameters=_LIMITS),
    }

    def command(self, bench: Bench, here: Path, incoming: str) -> list[str]:
        if incoming == "defer":
            what = ["--incoming", incoming, "--reserve", str(bench.memory)]
        elif incoming:
            what = ["--incoming", incoming]
        else:
            what = [str(bench.sector), "--memory", str(bench.memory)]
        monitors = [f"--qmp=unix:{here / name}" for name in ("a", "b")]
        return [sys.executable, "-m", "kvmmig", "run", *what, *monitors, "--serial", str(self._serial)]


class Qemu(Vmm):
    name = "QEMU"
    ways = {  # noqa: RUF012
        "tcp": Way("tcp:127.0.0.1:{port}", parameters=_LIMITS),
        "file": Way("file:{path}", ("mapped-ram",), {**_LIMITS, "direct-io": True}, synced=False),
        "pipe": Way(
            "exec:dd of={path} bs=1M oflag=direct iflag=fullblock conv=fsync 2>&-", parameters=_LIMITS
        ),
    }

    def command(self, bench: Bench, here: Path, incoming: str) -> list[str]:
        memory = f"memory-backend-ram,id=ram,size={bench.memory},prealloc=on"
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        command += [
            "-object",
            memory,
            "-machine",
            "pc,accel=kvm,memory-backend=ram",
            "-m",
            f"{bench.memory // MIB}",
        ]
        command += ["-cpu", bench.qemu_cpu, "-serial", f"file:{self._serial}"]
        command += ["-drive", f"file={bench.disk},format=raw,if=ide,file.locking=off,snapshot=on"]
        for name in ("a", "b"):
            command += ["-qmp", f"unix:{here / name},server=on,wait=off"]
        return [*command, *(["-incoming", incoming] if incoming else [])]


class QemuMultifd(Qemu):
    name = "QEMU, multifd 2"
    ways = {  # noqa: RUF012
        "tcp": Way("tcp:127.0.0.1:{port}", ("multifd",), {**_LIMITS, "multifd-channels": 2}),
        "file": Way(
            "file:{path}",
            ("mapped-ram", "multifd"),
            {**_LIMITS, "multifd-channels": 2, "direct-io": True},
            synced=False,
        ),
    }


PEERS: tuple[type[Vmm], ...] = (Kvmmig, Qemu, QemuMultifd)
STORED = ("file", "pipe")
ROWS = ("tcp", "file", "pipe", "restore")


# -- a move ------------------------------------------------------------------------------------------------


@dataclass
class Move:
    """Seconds; CPU in seconds a GB of guest. NaN where there is no such thing."""

    total: float
    downtime: float = float("nan")
    answer: float = float("nan")
    cpu: float = float("nan")
    setup: float = float("nan")


class Bench:
    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.memory: int = options.size
        self.directory = directory
        self.qemu_cpu: str = options.qemu_cpu
        self.sector, self.disk = directory / "sector.img", directory / "disk.img"
        values = {"TOP": self.memory, "HOT": options.hot, "PACE": options.pace, "MARK": options.mark}
        defines = [f"-D{name}={value}" for name, value in values.items()]
        subprocess.run(["nasm", "-f", "bin", *defines, "-o", str(self.sector), str(SECTOR)], check=True)
        self.disk.write_bytes(self.sector.read_bytes().ljust(MIB, b"\0"))

    def move(self, peer: type[Vmm], row: str) -> Move:
        way = peer.ways[row]
        image = self.directory / "image"
        with suppress(FileNotFoundError):
            image.unlink()
        with ExitStack() as stack:
            source = stack.enter_context(peer(self))
            source.wait_letter(0)
            uri, both, there = way.uri.format(port=_free_port(), path=image), [source], None
            if row not in STORED:
                there = stack.enter_context(peer(self, defer=True))
                there.prepare(way)
                there.wait_memory(self.memory)
                there.qmp("migrate-incoming", uri=uri)
                both.append(there)
            source.prepare(way)
            before, asker = sum(one.cpu() for one in both), Asker(source.asked)
            begin = time.time()
            source.qmp("migrate", uri=uri)
            stopped = source.qmp.wait("STOP")
            end = source.qmp.wait("MIGRATION", status="completed")
            if not way.synced:
                _sync(image)
                end = time.time()
            answer = asker.end()
            runs = there.qmp.wait("RESUME") if there else end
            cpu = sum(one.cpu() for one in both) - before
            setup = source.qmp("query-migrate").get("setup-time", float("nan")) / 1000
            if there:
                there.wait_letter(there.letters())
            return Move(end - begin, runs - stopped, answer, cpu * 1e9 / self.memory, setup)

    def restore(self, peer: type[Vmm]) -> Move:
        """Of an image that the same peer has just saved to a file; it is in the page cache for nobody."""
        self.move(peer, "file")
        image = self.directory / "image"
        _forget(image)
        way = peer.ways["file"]
        if not way.capabilities:
            with peer(self, incoming=way.uri.format(path=image)) as there:
                there.wait_letter(0)
                return Move(time.perf_counter() - there.started)
        with peer(self, defer=True) as there:
            there.prepare(way)
            there.qmp("migrate-incoming", uri=way.uri.format(path=image))
            there.wait_letter(0)
            return Move(time.perf_counter() - there.started)

    def once(self, peer: type[Vmm], row: str) -> Move:
        return self.restore(peer) if row == "restore" else self.move(peer, row)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


# -- load and limits -----------------------------------------------------------------------------------------

_WRITER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)
block = mmap.mmap(-1, 1 << 20)
while True:
    for at in range(0, 256 << 20, 1 << 20):
        os.pwrite(fd, block, at)
"""
_LOOP = """
import sys, time, trio
async def main():
    worst, end = 0.0, time.perf_counter() + 1
    while (now := time.perf_counter()) < end:
        await trio.sleep(0.002)
        worst = max(worst, time.perf_counter() - now - 0.002)
    print(worst)
trio.run(main)
"""


@contextmanager
def load(kind: str, directory: Path) -> Iterator[None]:
    commands: list[list[str]] = []
    if kind in ("hogs", "hogs+disk"):
        commands += [["sh", "-c", "while :; do :; done"]] * 4
    if kind == "hogs+disk":
        commands.append([sys.executable, "-c", _WRITER, str(directory / "writer")])
    processes = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@dataclass
class Limits:
    """What a plain loop reaches here and now: bytes a second, and seconds."""

    tcp: float
    direct: float
    loop: float


def limits(bench: Bench) -> Limits:
    size = min(bench.memory, 256 * MIB)
    told = subprocess.run([sys.executable, "-c", _LOOP], capture_output=True, text=True, check=True)
    return Limits(plain_tcp(size), plain_direct(bench.directory / "plain", size), float(told.stdout))


# -- the table -------------------------------------------------------------------------------------------


def spread(values: list[float], show: Any) -> str:
    good = sorted(value for value in values if value == value)
    if not good:
        return ""
    text = show(statistics.median(good))
    return text if len(good) == 1 else f"{text} ({show(good[0])}-{show(good[-1])})"


def report(bench: Bench, kind: str, moves: dict[tuple[str, str], list[Move]], taken: list[Limits]) -> Table:
    table = Table(title=f"{format_size(bench.memory)} guest, {kind}", title_justify="left")
    for title in (
        "row",
        "peer",
        "total",
        "downtime",
        "slowest answer",
        "CPU s/GB",
        "setup",
        "kvmmig / best QEMU",
    ):
        table.add_column(title, no_wrap=title in ("row", "peer"))
    for row in dict.fromkeys(row for row, _ in moves):
        for peer in PEERS:
            if (some := moves.get((row, peer.name))) is None:
                continue
            if not some:
                table.add_row(row, peer.name, "failed each time")
                continue
            cells = [
                spread([getattr(m, name) for m in some], format_duration)
                for name in ("total", "downtime", "answer")
            ]
            cells.append(spread([m.cpu for m in some], "{:.2f}".format))
            cells.append(spread([m.setup for m in some], format_duration))
            table.add_row(row, peer.name, *cells, ratios(row, moves) if peer is Kvmmig else "")
        table.add_section()
    rates = [spread([getattr(one, name) for one in taken], format_rate) for name in ("tcp", "direct")]
    loop = spread([one.loop for one in taken], format_duration)
    table.caption = (
        f"limits: plain TCP {rates[0]}; plain O_DIRECT {rates[1]}; a bare event loop's longest wait {loop}"
    )
    table.caption_justify = "left"
    return table


def ratios(row: str, moves: dict[tuple[str, str], list[Move]]) -> str:
    """Of the medians, for each figure beside the better of the other peers."""
    said = []
    for name in ("total", "downtime", "answer", "cpu"):
        medians = {}
        for (of, peer), some in moves.items():
            good = [getattr(m, name) for m in some if getattr(m, name) == getattr(m, name)]
            if of == row and good:
                medians[peer] = statistics.median(good)
        ours, others = medians.pop(Kvmmig.name, None), list(medians.values())
        if ours is not None and others and min(others) > 0:
            said.append(f"{name} {ours / min(others):.2f}")
    return ", ".join(said)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make peers", description="kvmmig beside QEMU, in ratios")
    parser.add_argument("--rows", default=",".join(ROWS), help="of tcp, file, pipe, restore")
    parser.add_argument("--loads", default="idle,hogs", help="of idle, hogs (4 busy loops), hogs+disk")
    parser.add_argument(
        "--size", type=parse_size, default=1 << 30, help="of the guest's memory, such as 512MiB"
    )
    parser.add_argument("--hot", type=parse_size, default=64 * MIB, help="how much of it is rewritten")
    parser.add_argument("--pace", type=int, default=0, help="TSC cycles a page; 0 is flat out")
    parser.add_argument("--mark", type=int, default=50, help='passes over the hot set for each "."')
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--qemu-cpu", default="host,-arch-capabilities", help="QEMU's -cpu")
    parser.add_argument(
        "--directory", type=Path, default=None, help="where images go: on a disk, not in memory"
    )
    parser.add_argument("--json", type=Path, help="every move of every peer, to this file")
    parser.add_argument("--svg", type=Path, help="the tables as a picture")
    options = parser.parse_args()
    if not options.hot + 2 * MIB <= options.size <= MOST:
        parser.error(f"--size is at most {format_size(MOST)}, and 2 MiB more than --hot at least")
    if unknown := set(options.rows.split(",")) - set(ROWS):
        parser.error(f"there is no row {min(unknown)!r}; the rows are {', '.join(ROWS)}")
    if unknown := set(options.loads.split(",")) - {"idle", "hogs", "hogs+disk"}:
        parser.error(f"there is no load {min(unknown)!r}; the loads are idle, hogs, hogs+disk")
    for program, package in {"nasm": "nasm", "qemu-system-x86_64": "qemu-system-x86"}.items():
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed; on Debian it is in the package {package}")
    return options


def main() -> None:
    options = _arguments()
    console = Console(record=True, width=None if sys.stdout.isatty() else 160)
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    console.print(
        f"{version.stdout.splitlines()[0]}; Linux {platform.release()}, {os.cpu_count()} CPUs",
        highlight=False,
    )
    everything = []
    with tempfile.TemporaryDirectory(prefix="peers-", dir=options.directory or Path.cwd()) as name:
        bench = Bench(options, Path(name))
        for kind in options.loads.split(","):
            moves: dict[tuple[str, str], list[Move]] = {}
            taken: list[Limits] = []
            for _ in range(options.repeats):
                for row in options.rows.split(","):
                    with load(kind, bench.directory):
                        taken.append(limits(bench))
                        for peer in PEERS:
                            if (row if row != "restore" else "file") not in peer.ways:
                                continue
                            some = moves.setdefault((row, peer.name), [])
                            try:
                                some.append(bench.once(peer, row))
                            except (PeerError, KvmmigError, queue.Empty, OSError) as error:
                                console.print(f"{row}, {peer.name}: {error}", style="bold", highlight=False)
            console.print(report(bench, kind, moves, taken))
            everything.append(
                {
                    "load": kind,
                    "size": bench.memory,
                    "moves": [
                        {"row": r, "peer": p, **asdict(m)} for (r, p), some in moves.items() for m in some
                    ],
                    "limits": [asdict(one) for one in taken],
                }
            )
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    if options.svg:
        console.save_svg(str(options.svg), title="kvmmig beside QEMU")


if __name__ == "__main__":
    main()
