"""Lab 5, one solution: the bounded step, and the step in a thread."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

import trio
from blackout import Save
from saving import Outcome, Run, Step, save_guest, write_runs

import kvmmig

BOUND = 0.010  # seconds


def unbounded_step(save: Save) -> Outcome:
    """Ends on EAGAIN, or when nothing is left of the round. No VMM should have it."""
    while save.more():
        if not save.write():
            return "full"
    return "done"


def bounded_step(save: Save) -> Outcome:
    """The same, but it ends after `BOUND` too, and says then that it was "late"."""
    end = perf_counter() + BOUND
    while save.more():
        if not save.write():
            return "full"
        if perf_counter() >= end:
            return "late"
    return "done"


async def send(save: Save, step: Step) -> None:
    """A round, step by step. Between two steps the loop turns, and only there."""
    while (outcome := step(save)) != "done":
        if outcome == "full":
            await trio.lowlevel.wait_writable(save.fd)
        await trio.lowlevel.checkpoint()


async def send_in_thread(save: Save, step: Step) -> None:
    """The same, with each step in a thread."""
    while (outcome := await trio.to_thread.run_sync(step, save)) != "done":
        if outcome == "full":
            await trio.lowlevel.wait_writable(save.fd)


async def main(memory: str) -> list[Run]:
    async with kvmmig.open_machine("dirtier", memory=memory, settings={"hot": "1MiB"}) as machine:
        await machine.start()
        await trio.sleep(1)
        return [
            await save_guest(machine, "a: until EAGAIN", unbounded_step, send),
            await save_guest(machine, "b: 10 ms at most", bounded_step, send),
            await save_guest(machine, "c: in a thread", unbounded_step, send_in_thread),
            await save_guest(machine, "d: a, to a file", unbounded_step, send, sink="file"),
        ]


if __name__ == "__main__":
    runs = trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "256MiB")
    write_runs(runs, Path("runs.json"))
    for run in runs:
        worst = max(took for _, took, _ in run.steps)
        silent = max(took for _, took in run.answers)
        print(
            f"{run.way:18} {len(run.steps):5} steps, the longest {worst:.3f} s; "
            f"an answer took {silent:.3f} s; {run.sent_bytes / run.total / 1e6:.0f} MB/s"
        )
