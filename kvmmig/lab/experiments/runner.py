"""Runs the trials of an experiment, one after the other, each in processes of its own."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any

import msgspec
import trio

from kvmmig.lab.experiments.asking import Answers, ask_monitor, asking_a_bare_loop
from kvmmig.lab.experiments.processes import busy_processes, start_module
from kvmmig.lab.experiments.results import Results, Row
from kvmmig.lab.experiments.spec import Trial
from kvmmig.lab.experiments.trial import Task

#: Seconds that a trial may take beyond its own limit of time; then it is killed, and its row says so.
_GRACE = 60.0
#: Characters of what a crashed trial has said that its row keeps.
_LAST_WORDS = 500

#: Told each trial that is done: how many are, how many there are, the seconds that are left, its row.
Progress = Callable[[int, int, float, Row], None]


async def run_experiment(trials: Sequence[Trial], results: Results, on_trial: Progress) -> None:
    """Try what has no row yet, and keep a row of each: also of one that crashes, or hangs.

    A cancel ends the trial that is at work, which then has no row.
    """
    todo = [trial for trial in trials if results.row_of(trial) is None]
    begin = perf_counter()
    for number, trial in enumerate(todo, 1):
        figures = await run_apart(trial, results)
        row = await trio.to_thread.run_sync(results.add, trial, figures)
        left = (perf_counter() - begin) / number * (len(todo) - number)
        on_trial(len(trials) - len(todo) + number, len(trials), left, row)


async def run_apart(trial: Trial, results: Results) -> dict[str, Any]:
    """One trial in processes of its own, with the monitor asked meanwhile; its figures."""
    for side in ("source", "destination"):
        results.record_of(trial, side).unlink(missing_ok=True)
    monitor, bare = Answers("monitor"), Answers("bare loop")
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmmig-"))
        task = Task(
            parameters=dict(trial.parameters),
            repeat=trial.repeat,
            directory=directory,
            record=str(results.record_of(trial, "source").absolute()),
            destination_record=str(results.record_of(trial, "destination").absolute()),
        )
        stack.enter_context(busy_processes(int(trial.parameters["busy"])))
        await stack.enter_async_context(asking_a_bare_loop(bare))
        figures = await _run_process(task, monitor, (trial.seconds("timeout") or 3600.0) + _GRACE)
        if "begin" in figures:
            begin, end = figures.pop("begin"), figures.pop("end")
            for answers in (monitor, bare):
                figures |= _summary(answers, begin, end)
                path = results.record_of(trial, "source")
                await trio.to_thread.run_sync(answers.append_to, path, begin, end)
    return figures


def _summary(answers: Answers, begin: float, end: float) -> dict[str, float]:
    taken = answers.between(begin, end)
    name = answers.who.replace(" ", "_")
    if not taken:
        return {}
    return {
        f"{name}_worst": taken[-1],
        f"{name}_p99": taken[min(int(0.99 * len(taken)), len(taken) - 1)],
        f"{name}_median": taken[len(taken) // 2],
    }


async def _run_process(task: Task, monitor: Answers, patience: float) -> dict[str, Any]:
    said: list[Mapping[str, Any]] = []
    errors = bytearray()
    with trio.move_on_after(patience) as scope:
        async with trio.open_nursery() as nursery, trio.open_nursery() as asking:
            process = await start_module(
                nursery,
                "kvmmig.lab.experiments.trial",
                input=msgspec.json.encode(task),
                keep_errors=True,
            )
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(_collect, process.stderr, errors)
            async for line in _lines(process.stdout):
                said.append(line)
                if "monitor" in line:
                    asking.start_soon(ask_monitor, line["monitor"], monitor)
            await process.wait()
            asking.cancel_scope.cancel()
    if scope.cancelled_caught:
        return {"outcome": "hung", "error": f"it had not ended after {patience:g} s, and was killed"}
    if not said or "outcome" not in said[-1]:
        words = errors.decode(errors="replace").strip()[-_LAST_WORDS:]
        return {"outcome": "crashed", "error": f"status {process.returncode}: {words}"}
    return dict(said[-1])


async def _collect(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
    async for data in stream:
        into += data
        del into[: -4 * _LAST_WORDS]


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[Mapping[str, Any]]:
    rest = bytearray()
    async for data in stream:
        rest += data
        *whole, rest = rest.split(b"\n")
        for line in whole:
            yield msgspec.json.decode(line, type=dict[str, Any])
