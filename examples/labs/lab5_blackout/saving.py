"""What lab 5 is done with: a guest is saved while its host's load changes, and a client asks meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Literal, TypeAlias

import msgspec
import trio
from blackout import Save, Variant

import kvmmig
from kvmmig.lab.experiments.asking import Answers, ask_monitor

HERE = Path(__file__).parent
#: How a step ended: nothing is left of the round; EAGAIN; its time was over.
Outcome: TypeAlias = Literal["done", "full", "late"]
Step: TypeAlias = Callable[[Save], Outcome]
Sending: TypeAlias = Callable[[Save], Awaitable[None]]

#: The parts of the host's load, over and over, and the seconds of each.
PARTS = ("disk=2", "calm=4", "cpu=2")
#: Pages that one write carries: it makes the writer as fast as the helper, more or less.
PAGES = 1
#: Bytes that wait in the pipe: the most that a user may have. With the kernel's own 64 KiB a step is shorter.
PIPE = 1 << 20


@dataclass
class Run:
    """One save. Times are in seconds since it began."""

    way: str
    #: When each step began, how long it took, how it ended.
    steps: list[tuple[float, float, Outcome]] = field(default_factory=list)
    #: When query-migrate was asked, and how long the answer took.
    answers: list[tuple[float, float]] = field(default_factory=list)
    #: When each part of the load began, and its name.
    parts: list[tuple[float, str]] = field(default_factory=list)
    total: float = 0.0
    cpu_time: float = 0.0
    sent_bytes: int = 0

    def timed(self, step: Step) -> Step:
        """The same step, but noted here."""

        def measured(save: Save) -> Outcome:
            began = perf_counter()
            outcome = step(save)
            self.steps.append((began, perf_counter() - began, outcome))
            return outcome

        return measured


async def save_guest(
    machine: kvmmig.Machine,
    way: str,
    step: Step,
    send: Callable[[Save, Step], Awaitable[None]],
    *,
    sink: Literal["pipe", "file"] = "pipe",
    parts: tuple[str, ...] = PARTS,
    directory: str = "/var/tmp",
) -> Run:
    """Save the running guest by ``send``, which calls ``step``. It runs afterwards; the file is gone."""
    run = Run(way)
    measured = run.timed(step)

    async def send_all(save: Save) -> None:
        await send(save, measured)

    with tempfile.TemporaryDirectory(prefix="lab5-", dir=directory) as folder:
        async with trio.open_nursery() as nursery, kvmmig.Monitor(machine, f"unix:{folder}/m") as monitor:
            answers = Answers("monitor")
            # In a thread, with a loop of its own: the one that is measured can't be who measures.
            nursery.start_soon(trio.to_thread.run_sync, trio.run, ask_monitor, monitor.addresses[0], answers)
            await _another_answer(answers)
            with changing_load(folder, parts) as load:
                began, cpu = perf_counter(), process_time()
                async with _sink(sink, f"{folder}/guest") as fd:
                    save = Save(machine, fd, Variant(sink, "a", way, PAGES), send_all)
                    run.sent_bytes = await save.run()
                run.total, run.cpu_time = perf_counter() - began, process_time() - cpu
            await _another_answer(answers)  # to what was asked while the last step lasted
        run.parts = [(at - began, name) for at, name in load]
    run.steps = [(at - began, took, outcome) for at, took, outcome in run.steps]
    run.answers = [(at - began, took) for at, took in answers.taken]
    return run


async def _another_answer(answers: Answers) -> None:
    count = len(answers.taken)
    with trio.fail_after(60):
        while len(answers.taken) == count:  # noqa: ASYNC110 -- another thread counts
            await trio.sleep(0.001)


@contextmanager
def changing_load(directory: str, parts: tuple[str, ...]) -> Iterator[list[tuple[float, str]]]:
    """The load of ``load.py``. At the end of the block the list has when each part began, and its name."""
    began: list[tuple[float, str]] = []
    command = [sys.executable, "-I", "-S", str(HERE / "load.py"), str(os.getpid()), directory, *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if parts:
                began.append(_part(process.stdout.readline()))
            yield began
        finally:
            process.terminate()
            began += [_part(line) for line in process.stdout]


def _part(line: str) -> tuple[float, str]:
    name, at = line.split()
    return float(at), name


def _start_helper(fd: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(HERE / "helper.py"), str(fd)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, pass_fds=[fd], pipesize=PIPE)


@asynccontextmanager
async def _sink(kind: str, path: str) -> AsyncIterator[int]:
    """A pipe to a helper that writes the file; or the file itself."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if kind == "pipe" else 0)
    fd = os.open(path, flags, 0o600)
    try:
        if kind == "file":
            yield fd
            await trio.to_thread.run_sync(os.fdatasync, fd)
            return
        with _start_helper(fd) as helper:
            assert helper.stdin is not None
            os.set_blocking(helper.stdin.fileno(), False)
            try:
                yield helper.stdin.fileno()
                await trio.to_thread.run_sync(helper.communicate)
            finally:
                helper.kill()
    finally:
        os.close(fd)


def write_runs(runs: list[Run], path: Path) -> None:
    """As JSON, for ``draw.py``."""
    path.write_bytes(msgspec.json.encode(runs))


def read_runs(path: Path) -> list[Run]:
    """The reverse of `write_runs`."""
    return msgspec.json.decode(path.read_bytes(), type=list[Run])
