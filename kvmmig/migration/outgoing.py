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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Protocol

import trio

from kvmmig.errors import (
    ChannelBroken,
    ConnectFailed,
    GuestEnded,
    KnobError,
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
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.migration import wire
from kvmmig.migration.cursor import Cursor
from kvmmig.migration.pages import OwedPages, PageMap
from kvmmig.migration.peer import Peer
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
from kvmmig.migration.stall import Histogram, StallMeter, stolen
from kvmmig.migration.transport import Channel, Transport

_KEPT_EVENTS = 1000
_GRACE = 0.05  # seconds


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
        pause_before_switchover: bool = False,
        on_phase: Callable[[Phase], None] | None = None,
        on_round: Callable[[RoundFigures], None] | None = None,
    ) -> None:
        """``transport`` may be a URI, which raises `BadURI` here where it is not understood.

        With ``pause_before_switchover`` the guest stands still after the last round until `proceed` is
        called. ``on_phase`` is told each phase as it begins, ``on_round`` the figures of each round as it
        ends; both are called on the event loop, and must be quick and not raise.
        """
        self._machine = machine
        self._memory = machine.memory
        self._transport = transport_for(transport) if isinstance(transport, str) else transport
        self._policy = policy if policy is not None else default_policy()
        self._policy_is_new = True
        self._limits = limits if limits is not None else Limits()
        self._pending = PageSet(machine.memory.n_pages)
        self._tracker = machine.dirty_tracker()
        self._encoder = wire.Encoder(wire.Direction.FORWARDS)
        self._cursor = Cursor()
        self._owed = OwedPages(self._memory, self._pending, self._encoder, self._cursor)
        self._bucket = TokenBucket(self._limits.bandwidth)
        self._throttled = 0.0
        self._deadline = trio.CancelScope()
        self._channel: Channel | None = None
        self._scope = trio.CancelScope()
        self._cancelled_by = ""
        self._moved = False
        self._paused_by_us = False
        self._proceed = trio.Event()
        if not pause_before_switchover:
            self._proceed.set()
        self._on_phase = on_phase
        self._on_round = on_round
        # figures
        self._phase = Phase.SETUP
        self._meter = StallMeter()
        self._steps = Histogram()
        self._stolen: float | None = None
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
        self._peer_name = str(self._transport.uri)
        self._peer = Peer(self._peer_name, lambda: self._phase)
        self._notices: tuple[str, ...] = ()
        self._error = ""

    # -- what others may ask ------------------------------------------------------------------------

    def statistics(self) -> MigrationStatistics:
        """The figures as they are at this moment."""
        now = self._ended if self._ended is not None else perf_counter()
        last = self._rounds[-1] if self._rounds else None
        return MigrationStatistics(
            phase=self._phase,
            peer=self._peer_name,
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
            stolen=self._stolen,
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
        self._limits = replace(self._limits, bandwidth=bytes_per_second)

    def set_policy(self, policy: Policy) -> None:
        """Have another policy decide, from the end of this round on. What the former one wanted is undone."""
        self._policy = policy
        self._policy_is_new = True

    def proceed(self) -> None:
        """Go on from the pre-switchover phase. `MigrationError` in any other one."""
        if self._phase is not Phase.PRE_SWITCHOVER:
            raise MigrationError(
                f"the migration is in its {self._phase} phase; it waits to be told to proceed only in the "
                f"{Phase.PRE_SWITCHOVER} phase"
            )
        self._proceed.set()

    def page_map(self, blocks: int) -> PageMap:
        """What is owed and what was sent, for each of ``blocks`` parts of the guest's memory or fewer.

        `ValueError` unless ``blocks`` is positive.
        """
        return self._owed.page_map(blocks)

    def knobs(self) -> Mapping[str, str]:
        """What can be turned on the channel now, and how it stands: ``{"throttle.rate": "50MB/s"}``."""
        return self._channel.knobs() if self._channel is not None else {}

    def turn(self, knob: str, value: str) -> None:
        """Turn one of `knobs`. `KnobError` where there is no such knob, or not such a value."""
        if self._channel is None:
            raise KnobError(f"there is no {knob!r} to turn: the migration has no channel yet")
        self._channel.turn(knob, value)

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
        stolen_before = stolen()
        with self._meter:
            try:
                with self._scope:
                    await self._in_time()
                if self._cancelled_by and not self._moved:
                    raise MigrationCancelled(
                        f"the migration to {self._peer_name} ended: {self._cancelled_by}"
                    )
            except BaseException as problem:
                self._ended = perf_counter()
                self._stolen = stolen() - stolen_before
                cancelled = isinstance(problem, MigrationCancelled) or _only_cancelled(problem)
                self._error = str(problem) or type(problem).__name__
                self._enter(Phase.UNKNOWN if self._moved else Phase.CANCELLED if cancelled else Phase.FAILED)
                raise
            self._ended = perf_counter()
            self._stolen = stolen() - stolen_before
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
            raise MigrationError(
                f"the migration to {self._peer_name} took longer than {self._limits.timeout:g} s{self._why()}"
            )

    def _is_forced(self) -> bool:
        limits = self._limits
        late = limits.timeout is not None and perf_counter() - self._started >= limits.timeout
        return late and limits.on_timeout == "force"

    async def _migrate(self) -> None:
        self._enter(Phase.SETUP)
        try:
            channel = await self._connect()
            self._peer_name = channel.peer or self._peer_name
            self._peer = Peer(self._peer_name, lambda: self._phase)
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
                await self._owed.settle()
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
                        await self._peer.last_words(0.5)
                    raise
                nursery.cancel_scope.cancel()

            if channel.features.two_way:
                nursery.start_soon(guard, lambda: self._peer.listen(channel))
            nursery.start_soon(guard, self._watch_guest)
            nursery.start_soon(guard, hand_over)

        if not failures or self._peer.has_said(wire.Kind.RUNNING):
            return
        refusals = [failure for failure in failures if isinstance(failure, MigrationRefused)]
        failure = (refusals or failures)[0]
        if not self._moved:
            raise failure
        # Also when it is found out before this side knows itself that "go" was accepted.
        raise OutcomeUnknown(
            f'the guest was handed over ("go" was sent to {self._peer_name}), but nobody said that it runs '
            f"there: {failure}. Look there first; it is stopped here and does not start again by itself"
        ) from failure

    async def _hand_over(self, channel: Channel) -> None:
        send = Sender(channel, self._cursor, self._steps, self._limits, self._bucket)
        await self._introduce(channel, send)
        self._setup_time = perf_counter() - self._started

        self._enter(Phase.ROUNDS)
        await trio.to_thread.run_sync(self._tracker.start)
        await self._collect()
        await self._begin_policy()
        while True:
            figures = await self._send_round(send)
            if self._on_round is not None:
                self._on_round(figures)
            if self._is_forced():
                self._note(f"{self._limits.timeout:g} s are over: the guest is stopped, whatever is left")
                break
            if self._policy_is_new:
                await self._begin_policy()
            decision = self._policy.decide(figures)
            await self._obey(decision)
            if isinstance(decision, Stop):
                break

        self._enter(Phase.STOP if self._proceed.is_set() else Phase.PRE_SWITCHOVER)
        running = self._machine.state is State.RUNNING
        self._stopped_at = perf_counter()
        if running:
            self._paused_by_us = True
            await self._machine.pause()
        if self._phase is Phase.PRE_SWITCHOVER:
            await self._wait_for_leave()
            self._enter(Phase.STOP)
        # Reading state can write guest memory, so the last dirty log comes after it.
        sections = await self._machine.capture()
        await self._collect()

        self._enter(Phase.FINAL)
        self._owed.begin()
        await send(self._owed.more)
        for section in sections:
            self._cursor.put(self._encoder.section(wire.Section(section.name, section.version, section.data)))
        self._cursor.put(self._encoder.end(running=running))
        await send()

        self._enter(Phase.COMMIT)
        await self._commit(channel, send)
        self._downtime = perf_counter() - self._stopped_at

    async def _commit(self, channel: Channel, send: Sender) -> None:
        """Let go of the guest: where somebody may start it, with "go"; else when it is safe."""
        self._check_stopped()
        go = self._encoder.signal(wire.Kind.GO)
        if channel.features.stores:
            # Nobody starts it from there by themselves: it stays ours until all of it is safe.
            self._cursor.put(go)
            await send()
            await self._finish(channel)
            self._hand_off()
            return
        if channel.features.two_way:
            await self._peer.hear(wire.Kind.READY, self._limits.handover_timeout)
        else:
            # What keeps a reader from taking all of it is best found out now.
            await self._bounded(channel.flush, "did not take the last bytes")
        self._check_stopped()
        self._cursor.put(go, accepted=self._hand_off)
        await send()
        if channel.features.two_way:
            await _with_grace(lambda: self._peer.hear(wire.Kind.RUNNING, self._limits.handover_timeout))
            channel.abort()
        else:
            await _with_grace(lambda: self._finish(channel))

    async def _introduce(self, channel: Channel, send: Sender) -> None:
        self._cursor.put(self._encoder.preamble())
        # A link has checksums of its own. Disks have none, and what goes one way may end, and lie, on one.
        self._owed.stable = not channel.features.two_way
        features = (wire.PAGE_DIGESTS,) if self._owed.stable else ()
        description = self._machine.description.encode()
        self._cursor.put(self._encoder.hello(self._memory.n_pages, description, features))
        await send()
        if channel.features.two_way:
            await self._peer.hear(wire.Kind.ACCEPT, self._limits.setup_timeout)

    async def _wait_for_leave(self) -> None:
        limits = self._limits
        patience = math.inf  # and a limit of time that cancels does so here too
        if limits.timeout is not None and limits.on_timeout == "force":
            patience = max(self._started + limits.timeout - perf_counter(), 0.0)
        with trio.move_on_after(patience):
            await self._proceed.wait()

    async def _begin_policy(self) -> None:
        self._policy_is_new = False
        self._bucket.rate = self._limits.bandwidth
        await self._slow_down(0.0)
        await self._obey(self._policy.start())

    async def _obey(self, decision: Decision) -> None:
        if isinstance(decision, GiveUp):
            raise MigrationError(f"the migration to {self._peer_name} was given up: {decision.reason}")
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
        self._owed.begin()
        if not await send(self._owed.more, enough=self._is_forced):
            await self._owed.settle()
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

    def _check_stopped(self) -> None:
        if self._machine.state is State.RUNNING:
            raise MigrationError(
                f"the guest {self._machine.state} although it was being handed over: somebody let it run, so "
                "the other side has not got the guest as it is now; migrate it again"
            )

    async def _finish(self, channel: Channel) -> None:
        await self._bounded(channel.flush, "did not take the last bytes")
        await self._bounded(channel.aclose, "was not done")

    async def _bounded(self, call: Callable[[], Awaitable[None]], what: str) -> None:
        with trio.move_on_after(self._limits.handover_timeout) as scope:
            await call()
        if scope.cancelled_caught:
            raise MigrationError(
                f"{self._peer_name} {what} within {self._limits.handover_timeout:g} s{self._why()}"
            )

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

    # -- figures ------------------------------------------------------------------------------------

    def _rate(self, now: float) -> float:
        return (self._cursor.accepted - self._round_base) / max(now - self._round_started, 1e-9)

    def _why(self) -> str:
        """What the channel waits for, to be put behind a sentence."""
        reason = self._channel.waits_for() if self._channel is not None else ""
        return f": {reason}" if reason else ""

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        if self._on_phase is not None:
            self._on_phase(phase)
        if self._channel is not None:
            self._channel.phase_changed(str(phase))
        self._note(str(phase))

    def _note(self, what: str) -> None:
        self._events.append(TimelineEvent(perf_counter() - self._started, what))


async def _with_grace(call: Callable[[], Awaitable[None]]) -> None:
    """After "go": a cancel from outside waits a moment, so that who has the guest gets the last byte too."""
    scope = trio.CancelScope(shield=True)
    failure: KvmmigError | None = None

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            scope.deadline = trio.current_time() + _GRACE

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            with scope:
                await call()
        except KvmmigError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _only_cancelled(problem: BaseException) -> bool:
    if isinstance(problem, BaseExceptionGroup):
        return all(_only_cancelled(part) for part in problem.exceptions)
    return isinstance(problem, trio.Cancelled)
