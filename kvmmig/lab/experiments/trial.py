"""One trial, in a process of its own: a guest is made, runs for a while, and is moved.

``python -m kvmmig.lab.experiments.trial`` reads a `Task` as JSON from its standard input, and prints lines of
JSON: first ``{"monitor": ADDRESS}``, when the migration may be asked for, last the row.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from time import perf_counter, process_time, time
from typing import Any

import msgspec
import trio

import kvmmig
from kvmmig.errors import KvmmigError, MigrationCancelled
from kvmmig.lab.experiments.processes import start_module
from kvmmig.lab.experiments.spec import DIRECTORY, NONE, Trial
from kvmmig.migration.policy import AutoConverge, DowntimeLimit, FirstOf, Limits, Policy
from kvmmig.migration.report import MigrationStatistics
from kvmmig.migration.stall_meter import stolen
from kvmmig.monitor.policies import PolicyChoice
from kvmmig.transport import Transport, TransportURI, transport_for
from kvmmig.units import parse_rate

#: A trial from whose host so large a share of its CPUs was withheld is marked.
STARVED = 0.1


class Task(msgspec.Struct):
    """A trial, and where its files go."""

    parameters: dict[str, str | int | float]
    repeat: int
    directory: str
    record: str
    destination_record: str


async def run_trial(task: Task, say: Any = lambda line: None) -> dict[str, Any]:
    """Do it. Returns its figures, of a migration that failed too; raises `KvmmigError` without any."""
    trial = Trial(task.parameters, task.repeat)
    uri = TransportURI.parse(trial.text("to").replace(DIRECTORY, task.directory))
    transport = transport_for(uri)
    async with kvmmig.open_machine(
        trial.text("guest"),
        memory=trial.text("memory"),
        cpus=int(trial.parameters["cpus"]),
        settings=trial.settings,
    ) as machine:
        async with (
            kvmmig.Monitor(machine, f"unix:{task.directory}/monitor") as monitor,
            _destination(transport, task) as real,
        ):
            await machine.start()
            with trio.move_on_after(trial.seconds("warm-up") or 0.0):
                ending = await machine.wait()
                raise KvmmigError(f"the guest ended before it was to be moved: {ending}")
            say({"monitor": monitor.addresses[0]})
            return await _migrate(trial, monitor, real, task.record)


async def _migrate(trial: Trial, monitor: kvmmig.Monitor, to: TransportURI, record: str) -> dict[str, Any]:
    outgoing, settings = monitor.control.outgoing, monitor.control.settings
    bandwidth = trial.text("bandwidth")
    limits = Limits(
        bandwidth=None if bandwidth == NONE else parse_rate(bandwidth), timeout=trial.seconds("timeout")
    )
    settings.parameters = msgspec.structs.replace(settings.parameters, x_kvmmig_record=record)
    transport = await trio.to_thread.run_sync(transport_for, to)
    begin, stolen_before, cpu = perf_counter(), stolen(), process_time()
    outgoing.begin(transport, policy=_policy(trial), limits=limits)
    latency: float | None = None
    with trio.move_on_after(trial.seconds("cancel-after") or float("inf")) as scope:
        await _settled(monitor)
    if scope.cancelled_caught:
        asked = perf_counter()
        outgoing.cancel("the experiment wants it")
        await _settled(monitor)
        latency = perf_counter() - asked
    migration = outgoing.migration
    assert migration is not None
    end = perf_counter()
    figures = _figures(migration.statistics())
    withheld = (stolen() - stolen_before) / max(end - begin, 1e-9) / len(os.sched_getaffinity(0))
    return figures | {
        "error": outgoing.error,
        "cancel_latency": latency,
        "cpu_time": process_time() - cpu,
        "withheld": withheld,
        "starved": withheld > STARVED,
        "begin": begin,
        "end": end,
        "wall": time(),
        "host": platform.node(),
        "kernel": platform.release(),
        "host_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kvmmig": kvmmig.__version__,
    }


async def _settled(monitor: kvmmig.Monitor) -> None:
    try:
        await monitor.control.outgoing.wait()
    except MigrationCancelled:
        pass
    except KvmmigError:  # the row says it
        pass


def _policy(trial: Trial) -> Policy:
    policy = PolicyChoice(trial.text("policy")).build()
    seconds = trial.seconds("downtime-limit")
    for part in policy.policies if isinstance(policy, FirstOf) else (policy,):
        if isinstance(part, DowntimeLimit) and seconds is not None:
            part.seconds = seconds
    assert not isinstance(policy, AutoConverge)
    return policy


def _figures(statistics: MigrationStatistics) -> dict[str, Any]:
    rounds = statistics.rounds
    later = rounds[1:] or rounds  # the first one sends what was never written
    return {
        "outcome": str(statistics.phase),
        "total_time": statistics.total_time,
        "setup_time": statistics.setup_time,
        "downtime": statistics.downtime,
        "expected_downtime": statistics.expected_downtime,
        "rounds": len(rounds),
        "sent_bytes": statistics.sent_bytes,
        "sent_pages": statistics.sent_pages,
        "zero_pages": statistics.zero_pages,
        "memory_bytes": statistics.total_pages * 4096,
        "sent_share": (statistics.sent_pages + statistics.zero_pages) / statistics.total_pages,
        "rate": sum(each.sent_bytes for each in rounds) / sum(each.duration for each in rounds)
        if rounds
        else None,
        "dirty_rate": sum(each.dirty_pages for each in later) * 4096 / sum(each.duration for each in later)
        if later
        else None,
        "worst_step": statistics.steps.worst,
        "worst_stall": statistics.worst_stall,
        "throttle": statistics.throttle,
        **{f"counter.{name}": value for name, value in statistics.counters.items()},
    }


@asynccontextmanager
async def _destination(transport: Transport, task: Task) -> AsyncIterator[TransportURI]:
    """The other side, in a process of its own, where there is to be one; what it listens at."""
    uri = transport.uri
    if transport.stores or uri.scheme in ("exec", "fd"):
        yield uri
        return
    async with trio.open_nursery() as nursery:
        process = await start_module(
            nursery, "kvmmig.lab.experiments.destination", str(uri), task.destination_record
        )
        assert process.stdout is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            if not (data := await process.stdout.receive_some()):
                raise KvmmigError(f"the destination at {uri} has ended before it listened")
            line += data
        try:
            yield replace(uri, target=TransportURI.parse(line.decode().strip()).target)
        finally:
            nursery.cancel_scope.cancel()


def main() -> None:
    """The process."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)

    def say(line: object) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
        sys.stdout.buffer.flush()

    try:
        say(trio.run(run_trial, task, say))
    except* KvmmigError as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        say({"outcome": "failed", "error": str(error)})


if __name__ == "__main__":
    main()
