"""A stream explained frame by frame: what ``tap+`` has kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmmig import stream
from kvmmig.errors import KvmmigError, StreamError
from kvmmig.stream.format import HEADER, MAGIC, PREAMBLE, Direction, Kind

_SCRATCH = 1 << 24
_SHOWN_RUNS = 4


@dataclass(frozen=True)
class Frame:
    """One frame: where it begins in the stream, how many bytes it has, what it is."""

    at: int
    size: int
    kind: str
    words: str


def dump_stream(path: Path) -> Iterator[Frame]:
    """The frames of the file, checked as a receiver checks them, without the pages' bytes.

    Raises `KvmmigError` where it can't be read, and `StreamError` at the first frame that is wrong, after
    those before it.
    """
    try:
        with path.open("rb") as file:
            start = file.read(PREAMBLE.size)
            file.seek(0)
            decoder = stream.Decoder(_direction(start))
            scratch = memoryview(bytearray(_SCRATCH))
            begin = pages_begin = 0
            pending: tuple[str, str] | None = None
            yield Frame(0, PREAMBLE.size + stream.format.IDENTITY_SIZE, "PREAMBLE", _preamble(start))
            while not decoder.finished:
                room = decoder.buffer()
                count = file.readinto(room)
                if not count:
                    decoder.end_of_stream()
                event = decoder.advance(count)
                if begin == 0 and decoder.identity:
                    begin = decoder.position
                if event is None:
                    continue
                if isinstance(event, stream.Pages):
                    pending = "PAGES", _runs(event.runs, event.n_pages)
                    pages_begin = decoder.position
                    size = event.n_pages * stream.PAGE_SIZE
                    decoder.place([scratch[:size]])
                    continue
                if isinstance(event, stream.PagesDone):
                    assert pending is not None
                    kind, words = pending
                    words += f", table of {pages_begin - begin - HEADER.size} bytes"
                else:
                    kind, words = _explained(event)
                yield Frame(begin, decoder.position - begin, kind, words)
                begin = decoder.position
            if file.read(1):
                raise StreamError(f"the file goes on behind the stream's end at byte {decoder.position}")
    except OSError as error:
        raise KvmmigError(f"{path}: {error.strerror}") from error
    except StreamError as error:
        error.args = (f"{path}: {error}",)
        raise


def _direction(start: bytes) -> Direction:
    if len(start) == PREAMBLE.size and start.startswith(MAGIC):
        try:
            return Direction(PREAMBLE.unpack(start)[2])
        except ValueError:
            pass
    return Direction.FORWARDS  # the decoder says what is wrong


def _preamble(start: bytes) -> str:
    if len(start) < PREAMBLE.size:
        return "cut off"
    _, version, direction = PREAMBLE.unpack(start)
    way = {Direction.FORWARDS: "to the destination", Direction.BACKWARDS: "back from it"}
    return f"version {version}, {way.get(direction, direction)}"


def _explained(event: stream.Event) -> tuple[str, str]:
    match event:
        case stream.Hello():
            features = ", ".join(event.features) or "none"
            return (
                "HELLO",
                f"{event.n_pages} pages, features: {features}; machine: {bytes(event.machine).decode()}",
            )
        case stream.Zeros(runs, n_pages):
            return "ZEROS", _runs(runs, n_pages)
        case stream.Section(name, version, data):
            return "SECTION", f"{name}, version {version}, {len(data)} bytes"
        case stream.End():
            running = "runs there" if event.running else "stays paused"
            return "END", (
                f"{event.pages} pages, {event.zero_pages} zero pages, {event.sections} sections; the guest "
                f"{running}; digest {event.digest}"
            )
        case stream.Fail(text):
            return "FAIL", text
        case stream.Signal(kind):
            return kind.name, ""
    return Kind.PAGES.name, ""


def _runs(runs: stream.format.Runs, n_pages: int) -> str:
    shown = ", ".join(
        f"{first}-{first + count - 1}" if count > 1 else str(first)
        for first, count in runs[:_SHOWN_RUNS].tolist()
    )
    more = f" and {len(runs) - _SHOWN_RUNS} runs more" if len(runs) > _SHOWN_RUNS else ""
    return f"{n_pages} pages: {shown}{more}"
