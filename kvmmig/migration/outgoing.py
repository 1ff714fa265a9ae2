"""The migration task: a running guest leaves through a channel, in bounded steps.

The phases are drawn in `docs/architecture.md` and named in `Phase`. What holds throughout:

- **A step** is a trio cancel scope around "send from the cursor until the round or the time is up". It ends
  by itself, whether the sink is always ready or never: it needs no EAGAIN and no bandwidth limit.
- **Nothing is lost.** Reading the dirty log clears it, so what was read is owed: it stays in ``pending``
  until the channel has accepted the last byte of its frame.
- **One side runs.** Until the commit any error or cancel leaves the source as it was, running if it ran.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter
from typing import Protocol

import trio

from kvmmig.errors import (
    ChannelBroken,
    ConnectFailed,
    GuestEnded,
    KvmmigError,
    MigrationCancelled,
    MigrationError,
    MigrationRefused,
    OutcomeUnknown,
    WrongState,
)
from kvmmig.machine.cpu import Ending
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.machine import State
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import Batch, PageNumbers, PageSet, runs_of
from kvmmig.machine.state import StateSection
from kvmmig.migration import wire
from kvmmig.migration.cursor import Cursor
from kvmmig.migration.policy import (
    Continue,
    Decision,
    GiveUp,
    Limits,
    Policy,
    RoundFigures,
    Stop,
    default_policy,
)
from kvmmig.migration.registry import transport_for
from kvmmig.migration.report import MigrationStatistics, Phase, TimelineEvent
from kvmmig.migration.sender import Sender, TokenBucket
from kvmmig.migration.stall import Histogram, StallMeter
from kvmmig.migration.transport import Channel, Transport

#: Runs shorter than this on average are gathered into one copy: a memcpy costs less than so many buffers.
_GATHER_BELOW = 16
#: The most pages that are copied in one go: 4 MiB.
_COPIED_PAGES = 1024
_KEPT_EVENTS = 1000


class Described(Protocol):
    """What a machine says of itself for the hello."""

    def encode(self) -> bytes: ...


class MigratableMachine(Protocol):
    """What the migration task needs of a machine; `kvmmig.machine.Machine` is one."""

    @property
    def memory(self) -> GuestMemory: ...
    @property
    def state(self) -> State: ...
    @property
    def description(self) -> Described: ...
    def dirty_tracker(self) -> DirtyTracker: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def capture(self) -> Sequence[StateSection]: ...
    async def wait(self) -> Ending: ...
    def mark_moved(self) -> None: ...
    async def throttle(self, share: float) -> None: ...


class OutgoingMigration:
    """One migration of one machine to one place. `run` it once; watch it by `statistics` meanwhile."""

    def __init__(
        self,
        machine: MigratableMachine,
        transport: Transport | str,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
    ) -> None:
        """``transport`` may be a URI, which raises `BadURI` here where it is not understood."""
        self._machine = machine
        self._memory = machine.memory
        self._transport = transport_for(transport) if isinstance(transport, str) else transport
        self._policy = policy if policy is not None else default_policy()
        self._limits = limits if limits is not None else Limits()
        self._pending = PageSet(machine.memory.n_pages)
        self._tracker = machine.dirty_tracker()
        self._encoder = wire.Encoder(wire.Direction.FORWARDS)
        self._cursor = Cursor()
        self._stable = False  # pages are copied before they are sent, so that they can have a digest
        self._bucket = TokenBucket(self._limits.bandwidth)
        self._throttled = 0.0
        self._deadline = trio.CancelScope()
        self._channel: Channel | None = None
        self._scope = trio.CancelScope()
        self._cancelled_by = ""
        self._moved = False
        self._paused_by_us = False
        self._said = {kind: trio.Event() for kind in (wire.Kind.ACCEPT, wire.Kind.READY, wire.Kind.RUNNING)}
        self._peer_silent = trio.Event()
        # figures
        self._phase = Phase.SETUP
        self._meter = StallMeter()
        self._steps = Histogram()
        self._rounds: list[RoundFigures] = []
        self._events: deque[TimelineEvent] = deque(maxlen=_KEPT_EVENTS)
        self._started = perf_counter()
        self._ended: float | None = None
        self._setup_time: float | None = None
        self._stopped_at: float | None = None
        self._downtime: float | None = None
        self._round_started = self._started
        self._round_base = 0
        self._round = 0
        self._peer = str(self._transport.uri)
        self._notices: tuple[str, ...] = ()
        self._error = ""

    # -- what others may ask ------------------------------------------------------------------------

    def statistics(self) -> MigrationStatistics:
        """The figures as they are at this moment."""
        now = self._ended if self._ended is not None else perf_counter()
        last = self._rounds[-1] if self._rounds else None
        return MigrationStatistics(
            phase=self._phase,
            peer=self._peer,
            round=self._round,
            total_pages=self._memory.n_pages,
            remaining_pages=len(self._pending),
            sent_pages=self._encoder.pages,
            zero_pages=self._encoder.zero_pages,
            sent_bytes=self._cursor.accepted,
            rate=last.rate if last is not None else self._rate(now),
            dirty_rate=last.dirty_rate if last is not None else 0.0,
            expected_downtime=last.expected_downtime if last is not None else None,
            downtime=self._downtime,
            setup_time=self._setup_time,
            total_time=now - self._started,
            step_bound=self._limits.step,
            steps=self._steps.snapshot(),
            turns=self._meter.turns.snapshot(),
            worst_turn_ran=self._meter.culprit,
            bandwidth=self._bucket.rate,
            throttle=self._throttled,
            rounds=tuple(self._rounds),
            events=tuple(self._events),
            notices=self._notices,
            error=self._error,
        )

    def cancel(self, why: str = "it was cancelled") -> None:
        """End the migration: `run` raises `MigrationCancelled`, and the guest goes on here.

        Raises `MigrationError` once "go" has been sent: from there on the guest belongs to the other side.
        """
        if self._moved:
            raise MigrationError("the guest has been handed over; it is too late to cancel the migration")
        self._cancelled_by = why
        self._scope.cancel()

    def set_bandwidth(self, bytes_per_second: float | None) -> None:
        """Change the limit while the migration runs; None is no limit. `ValueError` unless it is positive."""
        self._bucket.rate = bytes_per_second

    async def run(self) -> MigrationStatistics:
        """Migrate. Returns the final figures once the guest has moved.

        Raises a `TransportError`, `StreamError` or `MigrationError` when it has not: then dirty logging is
        off, the channel is aborted, and the guest runs if it ran before. A cancel leaves the same. The one
        exception is `OutcomeUnknown`, whose text says what an operator must find out.
        """
        self._started = self._round_started = perf_counter()
        if self._machine.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"the guest {self._machine.state}, so it can't be migrated; only a running or paused one can"
            )
        with self._meter:
            try:
                with self._scope:
                    await self._in_time()
                if self._cancelled_by and not self._moved:
                    raise MigrationCancelled(f"the migration to {self._peer} ended: {self._cancelled_by}")
            except BaseException as problem:
                self._ended = perf_counter()
                cancelled = isinstance(problem, MigrationCancelled) or _only_cancelled(problem)
                self._error = str(problem) or type(problem).__name__
                self._enter(Phase.UNKNOWN if self._moved else Phase.CANCELLED if cancelled else Phase.FAILED)
                raise
            self._ended = perf_counter()
            self._enter(Phase.DONE)
        return self.statistics()

    # -- the task -----------------------------------------------------------------------------------

    async def _in_time(self) -> None:
        if self._limits.timeout is None or self._limits.on_timeout == "force":
            await self._migrate()
            return
        with trio.move_on_after(self._limits.timeout) as self._deadline:
            await self._migrate()
        if self._deadline.cancelled_caught:
            raise MigrationError(f"the migration to {self._peer} took longer than {self._limits.timeout:g} s")

    def _is_forced(self) -> bool:
        limits = self._limits
        late = limits.timeout is not None and perf_counter() - self._started >= limits.timeout
        return late and limits.on_timeout == "force"

    async def _migrate(self) -> None:
        self._enter(Phase.SETUP)
        try:
            channel = await self._connect()
            self._peer = channel.peer or self._peer
            self._notices = channel.notices
            self._channel = channel
            channel.phase_changed(str(self._phase))
            try:
                await self._with_watchers(channel)
            except BaseException:
                channel.abort()
                raise
        finally:
            with trio.CancelScope(shield=True):  # short, and bounded: two ioctls a region and a resume
                await self._slow_down(0.0)
                await trio.to_thread.run_sync(self._tracker.stop)
                if self._paused_by_us and not self._moved:
                    await self._resume_source()

    async def _connect(self) -> Channel:
        with trio.move_on_after(self._limits.connect_timeout):
            return await self._transport.connect()
        raise ConnectFailed(f"{self._transport.uri} gave no connection in {self._limits.connect_timeout:g} s")

    async def _resume_source(self) -> None:
        try:
            await self._machine.resume()
        except WrongState:  # it was stopped meanwhile, by somebody who may
            return

    async def _with_watchers(self, channel: Channel) -> None:
        """Run the hand-over beside those who may end it: the guest, and the other side."""
        failures: list[KvmmigError] = []

        async with trio.open_nursery() as nursery:

            async def guard(work: Callable[[], Awaitable[None]]) -> None:
                try:
                    await work()
                except KvmmigError as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

            async def hand_over() -> None:
                try:
                    await self._hand_over(channel)
                except ChannelBroken:
                    if channel.features.two_way:  # its last words explain more than a broken pipe does
                        with trio.move_on_after(0.5):
                            await self._peer_silent.wait()
                    raise
                nursery.cancel_scope.cancel()

            if channel.features.two_way:
                nursery.start_soon(guard, lambda: self._watch_peer(channel))
            nursery.start_soon(guard, self._watch_guest)
            nursery.start_soon(guard, hand_over)

        if not failures or self._said[wire.Kind.RUNNING].is_set():
            return
        refusals = [failure for failure in failures if isinstance(failure, MigrationRefused)]
        failure = (refusals or failures)[0]
        if not self._moved:
            raise failure
        # Also when it is found out before this side knows itself that "go" was accepted.
        raise OutcomeUnknown(
            f'the guest was handed over ("go" was sent to {self._peer}), but the other side never said that '
            f"it runs: {failure}. Look there first; it is stopped here and does not start again by itself"
        ) from failure

    async def _hand_over(self, channel: Channel) -> None:
        send = Sender(channel, self._cursor, self._steps, self._limits, self._bucket)
        await self._introduce(channel, send)
        self._setup_time = perf_counter() - self._started

        self._enter(Phase.ROUNDS)
        await trio.to_thread.run_sync(self._tracker.start)
        await self._collect()
        await self._obey(self._policy.start())
        while True:
            figures = await self._send_round(send)
            if self._is_forced():
                self._note(f"{self._limits.timeout:g} s are over: the guest is stopped, whatever is left")
                break
            decision = self._policy.decide(figures)
            await self._obey(decision)
            if isinstance(decision, Stop):
                break

        self._enter(Phase.STOP)
        running = self._machine.state is State.RUNNING
        self._stopped_at = perf_counter()
        if running:
            self._paused_by_us = True
            await self._machine.pause()
        # Reading state can write guest memory, so the last dirty log comes after it.
        sections = await self._machine.capture()
        await self._collect()

        self._enter(Phase.FINAL)
        await send(self._owed_pages())
        for section in sections:
            self._cursor.put(self._encoder.section(wire.Section(section.name, section.version, section.data)))
        self._cursor.put(self._encoder.end(running=running))
        await send()

        self._enter(Phase.COMMIT)
        if channel.features.two_way:
            await self._hear(wire.Kind.READY, self._limits.handover_timeout)
            await self._go(send)
            await self._hear(wire.Kind.RUNNING, self._limits.handover_timeout)
            channel.abort()
        elif channel.features.live:
            # Whoever reads this may start the guest as soon as "go" is there.
            await self._drain(channel)
            await self._go(send)
            with trio.CancelScope(shield=True):  # cutting it off now could cost a reader who has the guest
                await self._finish(channel)
        else:
            # Nobody starts it from there by themselves: it stays ours until all of it is safe.
            self._cursor.put(self._encoder.signal(wire.Kind.GO))
            await send()
            await self._finish(channel)
            self._hand_off()
        self._downtime = perf_counter() - self._stopped_at

    async def _introduce(self, channel: Channel, send: Sender) -> None:
        self._cursor.put(self._encoder.preamble())
        # Disks and files have no checksum of their own, and a saved guest lies there for long. A link has.
        self._stable = channel.features.durable
        features = (wire.PAGE_DIGESTS,) if self._stable else ()
        description = self._machine.description.encode()
        self._cursor.put(self._encoder.hello(self._memory.n_pages, description, features))
        await send()
        if channel.features.two_way:
            await self._hear(wire.Kind.ACCEPT, self._limits.setup_timeout)

    async def _obey(self, decision: Decision) -> None:
        if isinstance(decision, GiveUp):
            raise MigrationError(f"the migration to {self._peer} was given up: {decision.reason}")
        if decision.bandwidth is not None:
            # The user's own limit holds, whatever a policy wants.
            self._bucket.rate = min(decision.bandwidth, self._limits.bandwidth or math.inf)
        if isinstance(decision, Continue) and decision.throttle is not None:
            await self._slow_down(decision.throttle)
            self._note(f"the vCPUs stand still for {decision.throttle:.0%} of the time")

    async def _slow_down(self, share: float) -> None:
        if share != self._throttled:
            await self._machine.throttle(share)
            self._throttled = share

    async def _send_round(self, send: Sender) -> RoundFigures:
        """Send what is pending; then see what was written meanwhile."""
        self._round = len(self._rounds)
        self._round_started = perf_counter()
        self._round_base = self._cursor.accepted
        pages, zeros = self._encoder.pages, self._encoder.zero_pages
        if not await send(self._owed_pages(), enough=self._is_forced):
            await send()  # what is half sent: see _collect
        now = perf_counter()
        rate = self._rate(now)
        dirty = await self._collect()
        duration = perf_counter() - self._round_started
        figures = RoundFigures(
            round=self._round,
            sent_pages=self._encoder.pages - pages,
            zero_pages=self._encoder.zero_pages - zeros,
            sent_bytes=self._cursor.accepted - self._round_base,
            duration=duration,
            dirty_pages=dirty,
            rate=rate if rate or not self._rounds else self._rounds[-1].rate,
            dirty_rate=dirty * wire.PAGE_SIZE / duration,
        )
        self._rounds.append(figures)
        self._note(f"round {figures.round}: {figures.sent_pages} pages sent, {dirty} written meanwhile")
        return figures

    async def _collect(self) -> int:
        """Read the dirty log into what is owed. Never while a frame is half sent: once that is accepted its
        pages are owed no more, and one that was written meanwhile would be forgotten with them."""
        assert self._cursor.empty
        return await trio.to_thread.run_sync(self._tracker.collect, self._pending)

    def _owed_pages(self) -> Callable[[], bool]:
        """Something that puts the next batch of pending pages into the cursor, and says whether it did."""
        # Pages that are copied first come in batches of 4 MiB: a copy holds the loop. Others come in large
        # frames, which cost both sides less.
        limit = _COPIED_PAGES if self._stable else wire.MAX_FRAME_PAGES
        batches = self._pending.batches(limit, _COPIED_PAGES)

        def more() -> bool:
            batch = next(batches, None)
            if batch is None:
                return False
            self._put_batch(batch)
            return True

        return more

    def _put_batch(self, batch: Batch) -> None:
        zero = self._memory.are_zero(batch.pages)
        for pages in _frames(batch.pages[zero]):
            self._cursor.put(self._encoder.zero_runs(runs_of(pages)))
        for pages in _frames(batch.pages[~zero]):
            runs = runs_of(pages)
            if self._stable or len(pages) < len(runs) * _GATHER_BELOW:
                data = [self._memory.gather(pages).data.cast("B")]
            else:
                data = [self._memory.pages(first, count) for first, count in runs.tolist()]
            self._cursor.put(*self._encoder.page_runs(runs, data))
        self._cursor.put(accepted=lambda: self._pending.discard(batch.first, batch.stop - batch.first))

    async def _go(self, send: Sender) -> None:
        self._cursor.put(self._encoder.signal(wire.Kind.GO), accepted=self._hand_off)
        await send()

    async def _drain(self, channel: Channel) -> None:
        await self._bounded(channel.flush, "did not take the last bytes")

    async def _finish(self, channel: Channel) -> None:
        await self._drain(channel)
        await self._bounded(channel.aclose, "was not done")

    async def _bounded(self, call: Callable[[], Awaitable[None]], what: str) -> None:
        with trio.move_on_after(self._limits.handover_timeout) as scope:
            await call()
        if scope.cancelled_caught:
            raise MigrationError(f"{self._peer} {what} within {self._limits.handover_timeout:g} s")

    def _hand_off(self) -> None:
        """The point of no return: called the moment that the last byte of "go" was accepted."""
        self._moved = True
        self._deadline.deadline = math.inf
        self._machine.mark_moved()
        self._note("the guest belongs to the other side")

    # -- those who may end it -----------------------------------------------------------------------

    async def _watch_guest(self) -> None:
        ending = await self._machine.wait()
        if not self._moved:
            raise GuestEnded(f"the guest ended before it had moved: {ending}")

    async def _watch_peer(self, channel: Channel) -> None:
        decoder = wire.Decoder(wire.Direction.BACKWARDS)
        try:
            while not decoder.finished:
                count = await channel.receive_some(decoder.buffer())
                if count == 0:
                    raise ChannelBroken(
                        f"{self._peer} closed the connection in this side's {self._phase} phase"
                    )
                match decoder.advance(count):
                    case wire.Signal(kind):
                        self._said[kind].set()
                    case wire.Fail(text):
                        raise MigrationRefused(f"{self._peer} can't take the guest: {text}")
        finally:
            self._peer_silent.set()

    async def _hear(self, kind: wire.Kind, seconds: float) -> None:
        with trio.move_on_after(seconds) as scope:
            await self._said[kind].wait()
        if scope.cancelled_caught:
            raise MigrationError(f'{self._peer} did not say "{kind.name.lower()}" within {seconds:g} s')

    # -- figures ------------------------------------------------------------------------------------

    def _rate(self, now: float) -> float:
        return (self._cursor.accepted - self._round_base) / max(now - self._round_started, 1e-9)

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._channel is not None:
            self._channel.phase_changed(str(phase))
        self._note(str(phase))

    def _note(self, what: str) -> None:
        self._events.append(TimelineEvent(perf_counter() - self._started, what))


def _frames(pages: PageNumbers) -> Iterator[PageNumbers]:
    """Cut pages into what one frame may have: all of them where they lie side by side."""
    if len(pages) and pages[-1] - pages[0] + 1 == len(pages):
        yield pages
    else:
        for first in range(0, len(pages), _COPIED_PAGES):
            yield pages[first : first + _COPIED_PAGES]


def _only_cancelled(problem: BaseException) -> bool:
    if isinstance(problem, BaseExceptionGroup):
        return all(_only_cancelled(part) for part in problem.exceptions)
    return isinstance(problem, trio.Cancelled)
