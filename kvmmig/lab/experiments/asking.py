"""How fast does a monitor answer meanwhile, and how fast a bare loop beside it on the same host?

``python -m kvmmig.lab.experiments.asking`` is that bare loop: trio, and an echo.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import trio

from kvmmig.errors import KvmmigError
from kvmmig.lab.experiments.processes import start_module
from kvmmig.migration.events import Answered, encode_lines
from kvmmig.qmp import QMPClient

#: Seconds between two questions.
_EVERY = 0.005


@dataclass
class Answers:
    """When somebody was asked, and how long the answer took; seconds."""

    who: str
    taken: list[tuple[float, float]] = field(default_factory=list)

    def between(self, begin: float, end: float) -> list[float]:
        """What the answers took that were asked for then, in ascending order."""
        return sorted(took for at, took in self.taken if begin <= at <= end)

    def append_to(self, record: Path, begin: float, end: float) -> None:
        """Put them into a record, as events."""
        events = [
            Answered(at=at, duration=took, who=self.who) for at, took in self.taken if begin <= at <= end
        ]
        with record.open("ab") as file:
            file.write(encode_lines(events))


async def ask_monitor(address: str, answers: Answers) -> None:
    """Ask ``query-migrate`` until this is cancelled, or the monitor is gone."""
    try:
        async with QMPClient.connect(address) as client:
            while True:
                began = perf_counter()
                await client.execute("query-migrate")
                answers.taken.append((began, perf_counter() - began))
                await trio.sleep(_EVERY)
    except KvmmigError:  # the trial has ended, and its row says how
        return


@asynccontextmanager
async def asking_a_bare_loop(answers: Answers) -> AsyncIterator[None]:
    """Ask a bare loop as long as the block lasts."""
    async with trio.open_nursery() as nursery:
        process = await start_module(nursery, "kvmmig.lab.experiments.asking")
        assert process.stdin is not None
        assert process.stdout is not None
        to, back = process.stdin, process.stdout

        async def ask() -> None:
            await to.send_all(b".")
            await back.receive_some(1)  # it has started
            while True:
                began = perf_counter()
                await to.send_all(b".")
                await back.receive_some(1)
                answers.taken.append((began, perf_counter() - began))
                await trio.sleep(_EVERY)

        nursery.start_soon(ask)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _echo() -> None:
    async with trio.lowlevel.FdStream(0) as source, trio.lowlevel.FdStream(1) as sink:
        async for data in source:
            await sink.send_all(data)


if __name__ == "__main__":
    trio.run(_echo)
