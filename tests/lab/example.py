"""A recorded migration that never was: two rounds and a final pass, with figures that are easy to check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmmig.migration.events import (
    Answered,
    Begun,
    Changed,
    Decided,
    DirtyLogRead,
    Ended,
    GuestStarted,
    Host,
    PagesMapped,
    PhaseBegun,
    Received,
    RecordedEvent,
    RoundSent,
    Sent,
    SideName,
    Stalled,
    StepTaken,
    SwitchedOver,
    TurnTaken,
    encode_lines,
    sender_of,
)
from kvmmig.migration.stall_meter import Durations, Histogram

MIB = 1 << 20


def begun(side: SideName, at: float, stream: str = "0123456789abcdef" * 2, clock: str = "one") -> Begun:
    host = Host(name="here", kernel="6.1", cpus=2, python="3.11", kvmmig="0.1")
    return Begun(
        at=at,
        side=side,
        stream=stream,
        clock=clock,
        wall=1.7e9 + at,
        uri="tcp:127.0.0.1:4444",
        host=host,
        pid=1,
        guest="dirtier",
        memory=64 * MIB,
        page_size=4096,
        cpus=1,
        parameters={"hot": 8 * MIB},
        policy="DowntimeLimit",
    )


def durations(*seconds: float) -> Durations:
    histogram = Histogram()
    for each in seconds:
        histogram.add(each)
    return histogram.snapshot()


def ended(at: float, **more: object) -> Ended:
    return Ended(
        at=at,
        outcome="done",
        total_time=2.0,
        bytes=88 * MIB,
        pages=22528,
        zero_pages=0,
        turns=durations(20e-6, 30e-6, 3e-3),
        **more,  # type: ignore[arg-type]  # of several types
    )


def source() -> list[RecordedEvent]:
    return [
        begun("source", 10.0),
        PhaseBegun(at=10.0, phase="setup"),
        PhaseBegun(at=10.1, phase="rounds"),
        DirtyLogRead(at=10.1, duration=0.001, pages=16384),
        RoundSent(
            at=10.2,
            round=0,
            duration=1.0,
            sent_pages=16384,
            zero_pages=0,
            sent_bytes=64 * MIB,
            dirty_pages=4096,
            spent={"link": 0.9},
        ),
        StepTaken(at=10.2, duration=0.01, sent_bytes=MIB),
        Sent(at=10.2, duration=0.5, sent_bytes=32 * MIB),
        Stalled(at=10.7, duration=0.2, held_by="link"),
        Sent(at=10.9, duration=0.3, sent_bytes=32 * MIB),
        PagesMapped(at=11.2, round=0, block_pages=4096, pending=[4096, 0, 0, 0], sent=[4096] * 4),
        Decided(at=11.2, round=0, policy="DowntimeLimit", decision="continue", throttle=0.2),
        Changed(at=11.3, what="bandwidth", value="100000000.0"),
        RoundSent(
            at=11.2,
            round=1,
            duration=0.25,
            sent_pages=4096,
            zero_pages=0,
            sent_bytes=16 * MIB,
            dirty_pages=2048,
            bandwidth=1e8,
            throttle=0.2,
        ),
        Sent(at=11.2, duration=0.25, sent_bytes=16 * MIB),
        PagesMapped(
            at=11.45, round=1, block_pages=4096, pending=[2048, 0, 0, 0], sent=[8192, 4096, 4096, 4096]
        ),
        Decided(at=11.45, round=1, policy="DowntimeLimit", decision="stop"),
        TurnTaken(at=11.45, duration=0.003, task="migrate"),
        SwitchedOver(
            at=11.5,
            park=0.001,
            proceed=0.0,
            capture=0.002,
            last_log=0.001,
            pages=0.1,
            state=0.001,
            flush=0.01,
            commit=0.005,
        ),
        RoundSent(
            at=11.504,
            round=2,
            final=True,
            duration=0.101,
            sent_pages=2048,
            zero_pages=0,
            sent_bytes=8 * MIB,
        ),
        Sent(at=11.504, duration=0.1, sent_bytes=8 * MIB),
        ended(11.62, downtime=0.12, steps=durations(0.005, 0.009, 0.0101), step_bound=0.01),
    ]


def destination(clock: str = "one") -> list[RecordedEvent]:
    return [
        begun("destination", 10.05, clock=clock),
        PhaseBegun(at=10.05, phase="populate"),
        PhaseBegun(at=10.1, phase="receive"),
        Received(at=10.2, duration=1.0, pages=16384),
        GuestStarted(at=11.617),
        PhaseBegun(at=11.617, phase="running"),
        ended(11.63),
    ]


def write(path: Path, *sides: Sequence[RecordedEvent]) -> Path:
    """A file with these sides, as it would be with lines of both among each other."""
    lines = []
    for side in sides:
        assert isinstance(side[0], Begun)
        lines += [(each.at, encode_lines([each], sender_of(side[0]))) for each in side]
    lines += [(each.at, encode_lines([each])) for each in (Answered(at=10.5, duration=2e-4, who="monitor"),)]
    path.write_bytes(b"".join(line for _, line in sorted(lines, key=lambda line: line[0])))
    return path
