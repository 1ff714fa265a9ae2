"""A migration as a Chrome trace, which Perfetto (https://ui.perfetto.dev) and chrome://tracing show.

The format: "Trace Event Format", a JSON object with ``traceEvents``; times are microseconds. A process is a
side, a thread is one row: phases, rounds, parts of the downtime, steps, sends, stalls, turns of the event
loop, dirty logs. Where both sides have one clock they stand under each other; else each begins at 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from kvmmig.lab.records import RecordedMigration, Side
from kvmmig.migration.events import (
    Answered,
    Changed,
    Decided,
    DirtyLogRead,
    EventsLost,
    GuestStarted,
    PhaseBegun,
    Received,
    RoundSent,
    Sent,
    Stalled,
    StepTaken,
    SwitchedOver,
    TurnTaken,
)

TraceEvent: TypeAlias = dict[str, Any]
#: The rows of each side, from top to bottom.
ROWS = (
    "phases",
    "rounds",
    "downtime",
    "steps",
    "sends",
    "stalls",
    "dirty log",
    "event loop",
    "received",
    "marks",
    "monitor",
)


def trace_of(migrations: Sequence[RecordedMigration]) -> dict[str, Any]:
    """The trace of these migrations; `msgspec.json.encode` or `json.dump` writes it."""
    events: list[TraceEvent] = []
    process = 0
    for migration in migrations:
        origin = min(side.begun.at for side in migration.sides)
        for side in migration.sides:
            process += 1
            name = f"{migration.name}: {side.begun.side}, {side.begun.uri}"
            begin = origin if migration.one_clock else side.begun.at
            events += _named(process, name)
            others = migration.others if side is migration.sides[0] else ()
            events += [
                {"pid": process, "tid": ROWS.index(row), **event}
                for row, event in (*_rows(side, begin), *_answers(others, begin))
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(process: int, name: str) -> Iterator[TraceEvent]:
    yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
    for row, words in enumerate(ROWS):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": row, "args": {"name": words}}
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": process,
            "tid": row,
            "args": {"sort_index": row},
        }


def _rows(side: Side, begin: float) -> Iterator[tuple[str, TraceEvent]]:
    def slice_of(name: str, at: float, duration: float, **details: object) -> TraceEvent:
        return {
            "ph": "X",
            "name": name,
            "ts": (at - begin) * 1e6,
            "dur": duration * 1e6,
            "args": details,
        }

    def mark(name: str, at: float, **details: object) -> TraceEvent:
        return {"ph": "i", "s": "p", "name": name, "ts": (at - begin) * 1e6, "args": details}

    def counter(name: str, at: float, **values: float) -> TraceEvent:
        return {"ph": "C", "name": name, "ts": (at - begin) * 1e6, "args": values}

    phases = side.of(PhaseBegun)
    ends = [each.at for each in phases[1:]] + [side.events[-1].at]
    for phase, end in zip(phases, ends, strict=True):
        yield "phases", slice_of(phase.phase, phase.at, end - phase.at)
    for event in side.events:
        match event:
            case RoundSent():
                name = "final pass" if event.final else f"round {event.round}"
                yield (
                    "rounds",
                    slice_of(
                        name,
                        event.at,
                        event.duration,
                        bytes=event.sent_bytes,
                        pages=event.sent_pages,
                        zero_pages=event.zero_pages,
                        dirty_pages=event.dirty_pages,
                        bandwidth=event.bandwidth,
                        throttle=event.throttle,
                        spent=dict(event.spent),
                        exits=dict(event.exits),
                    ),
                )
                yield (
                    "rounds",
                    counter("rate (MB/s)", event.at, sent=event.sent_bytes / max(event.duration, 1e-9) / 1e6),
                )
            case SwitchedOver():
                at = event.at
                for part, seconds in event.parts().items():
                    if seconds > 0:
                        yield "downtime", slice_of(part.replace("_", " "), at, seconds)
                    at += seconds
            case StepTaken():
                yield "steps", slice_of("step", event.at, event.duration, bytes=event.sent_bytes)
            case Sent():
                yield "sends", slice_of("send", event.at, event.duration, bytes=event.sent_bytes)
            case Stalled():
                yield (
                    "stalls",
                    slice_of(f"stall: {event.held_by}", event.at, event.duration, words=event.words),
                )
            case DirtyLogRead():
                yield "dirty log", slice_of("dirty log", event.at, event.duration, pages=event.pages)
            case TurnTaken():
                yield "event loop", slice_of("turn", event.at, event.duration, task=event.task)
            case Received():
                yield (
                    "received",
                    slice_of("zeros" if event.zero else "pages", event.at, event.duration, pages=event.pages),
                )
            case GuestStarted():
                yield "marks", mark("the guest runs here", event.at)
            case Decided():
                yield (
                    "marks",
                    mark(f"policy: {event.decision}", event.at, round=event.round, reason=event.reason),
                )
            case Changed():
                yield "marks", mark(f"changed: {event.what}", event.at, value=event.value)
            case EventsLost():
                yield "marks", mark(f"{event.count} events lost", event.at)


def _answers(others: Sequence[object], begin: float) -> Iterator[tuple[str, TraceEvent]]:
    for event in others:
        if isinstance(event, Answered):
            yield (
                "monitor",
                {
                    "ph": "X",
                    "name": event.who,
                    "ts": (event.at - begin) * 1e6,
                    "dur": event.duration * 1e6,
                    "args": {},
                },
            )
