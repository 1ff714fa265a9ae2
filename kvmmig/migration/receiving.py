"""The memory and the state of one guest, from a conversation into the machine that was made for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

import numpy as np
import trio

from kvmmig import stream
from kvmmig.errors import StateMismatch
from kvmmig.machine.machine import Machine
from kvmmig.machine.pageset import PageSet, Runs
from kvmmig.machine.state import StateSection
from kvmmig.migration.conversation import Conversation
from kvmmig.migration.recorder import Recorder

#: Runs shorter than this on average come through one buffer and are scattered: cheaper than many reads.
_SCATTER_BELOW = 16
#: Pages whose copying takes longer than a hop into a thread.
_WORTH_A_THREAD = 128


class Receiver:
    """Takes one guest in, up to the end of its state; counts it meanwhile."""

    def __init__(self, conversation: Conversation, machine: Machine, recorder: Recorder) -> None:
        self._recorder = recorder
        self._conversation = conversation
        self._memory = machine.memory
        self._touched = PageSet(machine.memory.n_pages)  # pages not in it are as the kernel gave them: zero
        self._sizes = machine.section_sizes()
        sizes = self._sizes.values()
        conversation.decoder.limit_sections(len(sizes), max(sizes), sum(sizes))
        self._sections: list[StateSection] = []
        #: Pages that came with their bytes.
        self.received_pages = 0
        #: Pages that were only said to be zero.
        self.zero_pages = 0

    async def receive(self, first: stream.Event) -> tuple[list[StateSection], stream.End]:
        """All of it, from its ``first`` event on: the state, and how the stream ended.

        Pages are received straight into guest memory. Raises as `Conversation.event` does, and
        `StateMismatch` for state that the machine has no place for.
        """
        event = first
        while not isinstance(event, stream.End):
            await self._take(event)
            event = await self._conversation.event()
        return self._sections, event

    async def _take(self, event: stream.Event) -> None:
        began = perf_counter()
        match event:
            case stream.Pages(runs, n_pages):
                await self._receive_pages(runs, n_pages)
                first, stop = _span(runs)
                self._touched.add(first, stop - first)
                self.received_pages += n_pages
                self._recorder.received(began, n_pages, zero=False)
            case stream.Zeros(runs, n_pages):
                if len(self._touched.pages(*_span(runs))):
                    await _off_the_loop(n_pages, self._memory.zero, runs)
                self.zero_pages += n_pages
                self._recorder.received(began, n_pages, zero=True)
            case stream.Section(name, version, data):
                _check_section(self._sizes, name, len(data))
                self._sections.append(StateSection(name, version, data))

    async def _receive_pages(self, runs: Runs, n_pages: int) -> None:
        """Straight into guest memory; where the runs are short, through one buffer."""
        memory, conversation = self._memory, self._conversation
        if n_pages >= len(runs) * _SCATTER_BELOW:
            conversation.decoder.place([memory.pages(first, count) for first, count in runs.tolist()])
            await conversation.event()
        else:
            data = np.empty((n_pages, stream.PAGE_SIZE // 8), np.uint64)
            conversation.decoder.place([data.data.cast("B")])
            await conversation.event()
            await _off_the_loop(n_pages, memory.scatter, runs, data)


async def _off_the_loop(n_pages: int, work: Callable[..., None], *arguments: object) -> None:
    """Do what takes about a microsecond a page: in a thread, where that is longer than the way there."""
    if n_pages < _WORTH_A_THREAD:
        work(*arguments)
    else:
        await trio.to_thread.run_sync(work, *arguments)


def _check_section(sizes: Mapping[str, int], name: str, size: int) -> None:
    if name not in sizes:
        raise StateMismatch(f"this machine has no place for the state section {name!r}")
    if size > sizes[name]:
        raise StateMismatch(f"the state section {name!r} has {size} bytes; it can have {sizes[name]} at most")


def _span(runs: Runs) -> tuple[int, int]:
    return int(runs[0, 0]), int(runs[-1].sum())
