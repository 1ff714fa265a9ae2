"""Looks at a machine by its monitor, and at its record where it writes one, and tells the page's viewers."""

from __future__ import annotations

import math
from time import perf_counter

import trio

from kvmmig.cli.livepage.history import BLOCKS, History
from kvmmig.cli.livepage.recordtail import RecordTail
from kvmmig.cli.livepage.viewers import Viewers
from kvmmig.cli.remote import figures_of, has_ended, migration_figures
from kvmmig.errors import ChannelBroken
from kvmmig.migration.events import AnyEvent, Changed, Decided, PagesMapped, Stalled, SwitchedOver
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.qmp.client import QMPClient
from kvmmig.units import format_rate

_EVERY = 0.2  # seconds between two looks
_WHILE_STOPPED = 0.02  # the same, while the guest stands still: that is soon over
_CLOCKS_DIFFER = 0.1  # seconds, for what a migration does before it begins its record
_RECORD_PATIENCE = 2.0  # seconds for the disk, once the machine is gone
_PHASES_STOPPED = (Phase.STOP, Phase.FINAL, Phase.COMMIT, Phase.HANDED_OVER)


class Looking:
    """One monitor's connection, for all viewers."""

    def __init__(self, client: QMPClient, history: History, viewers: Viewers) -> None:
        self._client = client
        self._history = history
        self._viewers = viewers
        self._record: RecordTail | None = None
        self._pid = 0
        self._pages_seen = -1.0  # what the migration's total time was then
        self._wanted = trio.Event()

    async def until_gone(self) -> None:
        """Look until the machine is gone, and say so to the viewers. A cancel leaves the client usable."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen)
                nursery.start_soon(self._follow_record)
                while True:
                    await self.look()
                    figures = self._history.figures
                    if figures is not None and figures.phase in _PHASES_STOPPED:
                        await trio.sleep(_WHILE_STOPPED)
                    else:
                        with trio.move_on_after(_EVERY):
                            await self._wanted.wait()
                    self._wanted = trio.Event()
        except* ChannelBroken:
            pass
        with trio.move_on_after(_RECORD_PATIENCE):
            await self._read_record()
        self._history.see_end()
        self._viewers.publish()

    async def look(self) -> None:
        """Look once. Raises `ChannelBroken`."""
        about = await self._client.execute("x-kvmmig-query-machine")
        self._pid = about["pid"]
        self._history.see_machine(about)
        figures, _ = await migration_figures(self._client)
        if figures is not None:
            if self._history.is_another(figures):
                await self._find_record(figures)
            self._history.see_figures(figures)
            begun = figures.sent_pages or figures.zero_pages  # until then nothing is pending, or sent
            if begun and figures.total_time != self._pages_seen:  # after its end that stays as it is
                self._pages_seen = figures.total_time
                await self._look_at_pages(figures.round)
        self._viewers.publish()

    async def _look_at_pages(self, round_number: int) -> None:
        seen = await self._client.execute("x-kvmmig-query-page-map", {"blocks": BLOCKS})
        self._history.see_map(round_number, seen["block-pages"], seen["pending"], seen["sent"], begin=False)

    async def _listen(self) -> None:
        """Have a look at once whenever the monitor tells of something, and take the last figures from it."""
        async for event in self._client.events():
            self._wanted.set()
            if event.name == "X_KVMMIG_MIGRATION_ENDED":
                self._history.see_figures(figures_of(event.data["figures"]))
                self._viewers.publish()

    async def _find_record(self, figures: MigrationStatistics) -> None:
        parameters = await self._client.execute("query-migrate-parameters")
        path = parameters.get("x-kvmmig-record")
        begun = -math.inf if has_ended(figures) else perf_counter() - figures.total_time - _CLOCKS_DIFFER
        self._record = RecordTail(path, self._pid, begun) if path else None

    async def _follow_record(self) -> None:
        # In a task of its own: where that disk is slow, all else goes on.
        while True:
            await self._read_record()
            await trio.sleep(_EVERY)

    async def _read_record(self) -> None:
        if self._record is None:
            return
        record = self._record
        events = await trio.to_thread.run_sync(record.new_events, abandon_on_cancel=True)
        if record is self._record and events:
            for at, event in events:
                self._see(at, event)
            self._viewers.publish()

    def _see(self, at: float, event: AnyEvent) -> None:
        history = self._history
        match event:
            case PagesMapped():
                history.see_map(event.round + 1, event.block_pages, event.pending, event.sent, begin=True)
            case Stalled():
                history.see_stall(at, event.duration, event.held_by, event.words)
            case Decided():
                history.see_happening(at, _decision(event))
            case Changed():
                history.see_happening(at, f"somebody said: {event.what} {event.value}".rstrip())
            case SwitchedOver():
                history.see_downtime({name.replace("_", " "): each for name, each in event.parts().items()})


def _decision(event: Decided) -> str:
    words = [f"the policy says: {event.decision}"]
    if event.bandwidth is not None:
        words.append(f"at {format_rate(event.bandwidth)}")
    if event.throttle is not None:
        words.append(f"vCPUs slowed down by {event.throttle:.0%}")
    if event.reason:
        words.append(event.reason)
    return ", ".join(words)
