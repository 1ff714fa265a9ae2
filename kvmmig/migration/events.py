"""What a migration can be recorded as: typed events, one JSON object each. `docs/record.md` explains them.

A record is a sequence of these, one a line. Times are seconds of the host's monotonic clock, so that both
sides of a migration share one clock where they share a host; `Begun.clock` says which clock it is, and
`Begun.stream` joins the two sides. A reader passes over events and fields that it does not know; a change
that it could not pass over is a new `SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import msgspec

from kvmmig.migration.stall_meter import Durations

#: The version of what is written here.
SCHEMA = 1

SideName: TypeAlias = Literal["source", "destination"]
#: What time is spent on: the channel (a link, or a disk behind it), pages being prepared, the limit.
HeldBy: TypeAlias = Literal["link", "disk", "cpu", "limit"]


class RecordedEvent(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", tag_field="event", omit_defaults=True
):
    """Something that happened, or began, ``at`` that second of the clock."""

    at: float


class Host(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where, and with what."""

    name: str
    kernel: str
    cpus: int  # that this process may use
    python: str
    kvmmig: str


class Begun(RecordedEvent, tag="begun", frozen=True, kw_only=True):
    """One side's first event."""

    schema: int = SCHEMA
    side: SideName
    #: The stream's identity, 32 hexadecimal digits; the same on both sides.
    stream: str
    #: Which clock ``at`` is of: what is equal can be compared.
    clock: str
    #: The wall clock's time at ``at``, in seconds since 1970.
    wall: float
    #: The other side's URI, or where this side listens.
    uri: str
    host: Host
    pid: int
    guest: str
    memory: int  # bytes
    page_size: int
    cpus: int
    #: The guest's own, its seed among them.
    parameters: Mapping[str, int | str] = {}
    policy: str = ""
    #: Those of `Limits` in force at the begin.
    limits: Mapping[str, float | bool | str | None] = {}


class PhaseBegun(RecordedEvent, tag="phase", frozen=True, kw_only=True):
    """The next phase begins: at a source one of `Phase`; at a destination one of hello, populate, receive,
    apply, ready, running."""

    phase: str


class RoundSent(RecordedEvent, tag="round", frozen=True, kw_only=True):
    """A round, or the final pass, that began ``at``."""

    round: int
    #: The guest stood still: these are the last pages and the machine's state.
    final: bool = False
    duration: float
    sent_pages: int  # with their bytes
    zero_pages: int  # only said to be zero
    sent_bytes: int  # accepted by the channel in ``duration``
    #: Written meanwhile, so pending for the next one.
    dirty_pages: int = 0
    #: The limit in bytes a second that was in force at its end; None is none.
    bandwidth: float | None = None
    #: The share of time for which the vCPUs stood still.
    throttle: float = 0.0
    #: Seconds of ``duration`` by what they were spent on.
    spent: Mapping[HeldBy, float] = {}
    #: How often vCPUs left the guest meanwhile, by the names of `kvmmig.kvm.exits`.
    exits: Mapping[str, int] = {}


class StepTaken(RecordedEvent, tag="step", frozen=True, kw_only=True):
    """One bounded step of sending."""

    duration: float
    sent_bytes: int


class Sent(RecordedEvent, tag="send", frozen=True, kw_only=True):
    """One call in which the channel accepted something."""

    duration: float
    sent_bytes: int


class Stalled(RecordedEvent, tag="stall", frozen=True, kw_only=True):
    """Not one byte was accepted for so long, 10 ms or more; most of it was spent on ``held_by``."""

    duration: float
    held_by: HeldBy
    #: What the channel itself says that it waits for.
    words: str = ""


class TurnTaken(RecordedEvent, tag="turn", frozen=True, kw_only=True):
    """A turn of the event loop that took 1 ms or more, and the task that ran longest in it."""

    duration: float
    task: str


class DirtyLogRead(RecordedEvent, tag="dirty-log", frozen=True, kw_only=True):
    """The dirty log was read, and cleared by that."""

    duration: float
    pages: int


class PagesMapped(RecordedEvent, tag="page-map", frozen=True, kw_only=True):
    """The guest's memory as blocks, when ``round`` had been sent and the dirty log been read."""

    round: int
    block_pages: int
    pending: list[int]  # of each block: pages that are pending
    sent: list[int]  # of each block: pages that were sent, or said to be zero, so far


class Decided(RecordedEvent, tag="decision", frozen=True, kw_only=True):
    """What the policy said after ``round``; ``out of time`` is the limit's word, and not the policy's."""

    round: int
    policy: str
    decision: Literal["continue", "stop", "give up", "out of time"]
    bandwidth: float | None = None
    throttle: float | None = None
    reason: str = ""


class Changed(RecordedEvent, tag="change", frozen=True, kw_only=True):
    """A person, or a program of theirs, changed something: ``bandwidth``, ``policy``, a knob's name; or said
    ``cancel`` or ``proceed``."""

    what: str
    value: str = ""


class SwitchedOver(RecordedEvent, tag="switchover", frozen=True, kw_only=True):
    """The downtime in seconds, split at the source; it began ``at``, and the parts stand in order."""

    park: float  # until the vCPUs stood still
    proceed: float  # until it was told to proceed, where that was asked for
    capture: float  # reading the machine's state
    last_log: float  # reading the last dirty log
    pages: float  # sending the last pages
    state: float  # sending the machine's state, and the end
    flush: float  # until "go" was offered: the other side was ready, or the disk has all
    commit: float  # until the other side said that the guest runs, or the channel had ended well

    @property
    def downtime(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Its parts, in the order of time."""
        return {name: getattr(self, name) for name in SWITCHOVER_PARTS}


SWITCHOVER_PARTS = ("park", "proceed", "capture", "last_log", "pages", "state", "flush", "commit")


class Received(RecordedEvent, tag="receive", frozen=True, kw_only=True):
    """At a destination: a frame of pages came, and lies in the guest's memory."""

    duration: float
    pages: int
    #: They were only said to be zero.
    zero: bool = False


class GuestStarted(RecordedEvent, tag="guest-started", frozen=True, kw_only=True):
    """At a destination: the guest's first instruction there."""


class Answered(RecordedEvent, tag="answer", frozen=True, kw_only=True):
    """A client asked the monitor, or a bare loop, at ``at``, and had its answer after so long."""

    duration: float
    who: str


class EventsLost(RecordedEvent, tag="lost", frozen=True, kw_only=True):
    """The file did not take so many events in time."""

    count: int


class Ended(RecordedEvent, tag="ended", frozen=True, kw_only=True):
    """One side's last event."""

    #: The phase that it ended in: done, failed, cancelled, unknown.
    outcome: str
    error: str = ""
    total_time: float
    downtime: float | None = None
    setup_time: float | None = None
    expected_downtime: float | None = None
    bytes: int
    pages: int
    zero_pages: int
    steps: Durations | None = None
    step_bound: float | None = None
    turns: Durations
    #: Seconds for which this host's own hypervisor kept its CPUs from running.
    stolen: float | None = None
    counters: Mapping[str, float] = {}
    notices: tuple[str, ...] = ()


AnyEvent: TypeAlias = (
    Begun
    | PhaseBegun
    | RoundSent
    | StepTaken
    | Sent
    | Stalled
    | TurnTaken
    | DirtyLogRead
    | PagesMapped
    | Decided
    | Changed
    | SwitchedOver
    | Received
    | GuestStarted
    | Answered
    | EventsLost
    | Ended
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyEvent)


class _Envelope(msgspec.Struct):
    event: str
    by: str = ""


_envelope = msgspec.json.Decoder(_Envelope)
#: The events by the name that they have in a record.
KINDS: Mapping[str, type[RecordedEvent]] = {
    str(kind.__struct_config__.tag): kind for kind in AnyEvent.__args__
}


def sender_of(begun: Begun) -> str:
    """What the lines of this side have as ``by``."""
    return f"{begun.side}-{begun.stream[:8]}"


def encode_lines(events: Iterable[RecordedEvent], by: str = "") -> bytes:
    """The events as a record has them: one JSON object a line, each with the side that it is ``by``."""
    head = b'{"by":' + _encoder.encode(by) + b","
    return b"".join(head + _encoder.encode(event)[1:] + b"\n" for event in events)


def decode_line(line: bytes | str) -> tuple[str, AnyEvent] | None:
    """One line of a record: whom it is by, and the event; None for a kind that is not known here.

    Raises `ValueError`, a sentence, for what is no event.
    """
    try:
        envelope = _envelope.decode(line)
        return (envelope.by, _decoder.decode(line)) if envelope.event in KINDS else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
