"""A stream becomes an image, and an image a stream; neither needs KVM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvmmig import stream
from kvmmig.errors import ImageError, StreamError
from kvmmig.image.builder import Builder
from kvmmig.image.format import BLOCK_PAGES, MEMORY_AT, PAGE_SIZE
from kvmmig.image.opened import OpenImage, Read
from kvmmig.image.pieces import Piece

#: What one frame of the stream may have, and what is converted in one go: 4 MiB.
_STEP = 1024


class StreamReader:
    """Reads a saved stream to its end: `memory` is then what it says, and so are the rest."""

    def __init__(self, read: Callable[[memoryview], int]) -> None:
        """``read`` fills a prefix of a buffer, and says how much; 0 is the end.

        Raises `StreamError` for bytes that are no whole stream.
        """
        self._read = read
        self._decoder = stream.Decoder(stream.Direction.FORWARDS)
        self.sections: list[stream.Section] = []
        hello = self._event()
        assert isinstance(hello, stream.Hello)  # the decoder lets nothing else come first
        #: What it says of its machine.
        self.hello: stream.Hello = hello
        #: All of the guest's RAM.
        self.memory = np.zeros((hello.n_pages, PAGE_SIZE // 8), np.uint64)
        self._came = np.zeros(hello.n_pages, np.bool_)  # what has not come with its bytes costs no memory
        self.end = self._read_all()

    def _read_all(self) -> stream.End:
        end: stream.End | None = None
        while not self._decoder.finished:
            match self._event():
                case stream.Pages(runs, _):
                    places = [self.memory[first : first + count] for first, count in runs.tolist()]
                    self._decoder.place([place.data.cast("B") for place in places])
                    for first, count in runs.tolist():
                        self._came[first : first + count] = True
                case stream.Zeros(runs, _):
                    for first, count in runs.tolist():
                        if self._came[first : first + count].any():
                            self.memory[first : first + count] = 0
                case stream.Section() as section:
                    self.sections.append(section)
                case stream.End() as end:
                    pass
                case stream.Fail(text):
                    raise StreamError(f"its source gave it up: {text}")
        assert end is not None
        if self._read(memoryview(bytearray(1))):
            raise StreamError("it goes on behind its end")
        return end

    def _event(self) -> stream.Event:
        while True:
            count = self._read(self._decoder.buffer())
            if not count:
                self._decoder.end_of_stream()
            if (event := self._decoder.advance(count)) is not None:
                return event


def image_of(reader: StreamReader, put: Callable[[Piece], object], *, saved_by: str) -> None:
    """Put the pieces of the image that says the same as a stream."""
    memory = reader.memory

    def pages(first: int, count: int) -> memoryview:
        return memory[first : first + count].data.cast("B")

    builder = Builder(len(memory), pages)
    for first in range(0, len(memory), _STEP):
        part = memory[first : first + _STEP]
        zero = np.logical_not(np.logical_or.reduce(part != 0, axis=1))
        for piece in builder.write(first, np.ones(len(part), np.bool_), zero):
            put(piece)
    machine, running = bytes(reader.hello.machine), reader.end.running
    for piece in builder.finish(machine, reader.sections, running=running, saved_by=saved_by):
        put(piece)


def stream_of(opened: OpenImage, read: Read, put: Callable[[bytes | memoryview], object]) -> None:
    """Put the bytes of the stream that says the same as an image. Raises `ImageError` for a damaged one."""
    encoder = stream.Encoder(stream.Direction.FORWARDS)
    n_pages = opened.header.n_pages
    put(encoder.preamble())
    put(encoder.hello(n_pages, bytes(opened.header.machine), (stream.PAGE_DIGESTS,)))
    at = 0
    for first, count in [*opened.data_runs(BLOCK_PAGES).tolist(), [n_pages, 0]]:
        for start in range(at, first, stream.MAX_FRAME_PAGES):
            put(encoder.zero_runs(_run(start, min(stream.MAX_FRAME_PAGES, first - start))))
        for start in range(first, first + count, _STEP):
            step = min(_STEP, first + count - start)
            data = memoryview(read(MEMORY_AT + start * PAGE_SIZE, step * PAGE_SIZE))
            _check(opened, start, data)
            for buffer in encoder.page_runs(_run(start, step), [data]):
                put(buffer)
        at = first + count
    for section in opened.sections:
        put(encoder.section(section))
    put(encoder.end(running=opened.header.running))
    put(encoder.signal(stream.Kind.GO))


def _check(opened: OpenImage, first: int, data: memoryview) -> None:
    block_size = BLOCK_PAGES * PAGE_SIZE
    for at in range(0, len(data), block_size):
        block = first // BLOCK_PAGES + at // block_size
        problem = opened.page_map[block] and opened.check_block(block, data[at : at + block_size])
        if problem:
            raise ImageError(problem)


def _run(first: int, count: int) -> stream.Runs:
    return np.array([[first, count]], np.int64)
