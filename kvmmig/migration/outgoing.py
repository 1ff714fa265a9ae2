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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from kvmmig import stream
from kvmmig.migration.commit import commit
from kvmmig.stream.cursor import Cursor
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
from kvmmig.migration.record import Record
from kvmmig.transport.registry import transport_for
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.migration.steps import Sender, TokenBucket, because
from kvmmig.transport import Channel, Transport


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
        self._encoder = stream.Encoder(stream.Direction.FORWARDS)
        self._cursor = Cursor()
        self._record = Record(self._encoder, self._cursor)
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
        self._peer_name = str(self._transport.uri)
        self._peer = Peer(self._peer_name, lambda: self._record.phase)

    # -- what others may ask ------------------------------------------------------------------------

    def statistics(self) -> MigrationStatistics:
        """The figures as they are at this moment."""
        return self._record.statistics(
            peer=self._peer_name,
            total_pages=self._memory.n_pages,
            remaining_pages=len(self._pending),
            step_bound=self._limits.step,
            bandwidth=self._bucket.rate,
            throttle=self._throttled,
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
        if self._record.phase is not Phase.PRE_SWITCHOVER:
            raise MigrationError(
                f"the migration is in its {self._record.phase} phase; it waits to be told to proceed only in "
                f"the {Phase.PRE_SWITCHOVER} phase"
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
        if self._machine.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"the guest {self._machine.state}, so it can't be migrated; only a running or paused one can"
            )
        with self._record.running():
            try:
                with self._scope:
                    await self._in_time()
                if self._cancelled_by and not self._moved:
                    raise MigrationCancelled(
                        f"the migration to {self._peer_name} ended: {self._cancelled_by}"
                    )
            except BaseException as problem:
                cancelled = isinstance(problem, MigrationCancelled) or _only_cancelled(problem)
                self._record.error = str(problem) or type(problem).__name__
                self._enter(Phase.UNKNOWN if self._moved else Phase.CANCELLED if cancelled else Phase.FAILED)
                raise
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
                f"the migration to {self._peer_name} took longer than {self._limits.timeout:g} s"
                f"{because(self._channel)}"
            )

    def _is_forced(self) -> bool:
        limits = self._limits
        late = limits.timeout is not None and self._record.elapsed >= limits.timeout
        return late and limits.on_timeout == "force"

    async def _migrate(self) -> None:
        self._enter(Phase.SETUP)
        try:
            channel = await self._connect()
            self._peer_name = channel.peer or self._peer_name
            self._peer = Peer(self._peer_name, lambda: self._record.phase)
            self._record.notices = channel.notices
            self._channel = channel
            channel.phase_changed(str(self._record.phase))
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

        if not failures or self._peer.has_said(stream.Kind.RUNNING):
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
        send = Sender(channel, self._cursor, self._record.steps, self._limits, self._bucket)
        await self._introduce(channel, send)
        self._record.set_up()

        self._enter(Phase.ROUNDS)
        await trio.to_thread.run_sync(self._tracker.start)
        await self._collect()
        await self._begin_policy()
        while True:
            figures = await self._send_round(send)
            if self._on_round is not None:
                self._on_round(figures)
            if self._is_forced():
                self._record.note(
                    f"{self._limits.timeout:g} s are over: the guest is stopped, whatever is left"
                )
                break
            if self._policy_is_new:
                await self._begin_policy()
            decision = self._policy.decide(figures)
            await self._obey(decision)
            if isinstance(decision, Stop):
                break

        self._enter(Phase.STOP if self._proceed.is_set() else Phase.PRE_SWITCHOVER)
        running = self._machine.state is State.RUNNING
        self._record.stopping()
        if running:
            self._paused_by_us = True
            await self._machine.pause()
        if self._record.phase is Phase.PRE_SWITCHOVER:
            await self._wait_for_leave()
            self._enter(Phase.STOP)
        # Reading state can write guest memory, so the last dirty log comes after it.
        sections = await self._machine.capture()
        await self._collect()

        self._enter(Phase.FINAL)
        self._owed.begin()
        await send(self._owed.more)
        for section in sections:
            self._cursor.put(self._encoder.section(stream.Section(section.name, section.version, section.data)))
        self._cursor.put(self._encoder.end(running=running))
        await send()

        self._enter(Phase.COMMIT)
        await commit(
            channel,
            self._peer,
            say_go=partial(self._say_go, send),
            let_go=self._let_go,
            patience=self._limits.handover_timeout,
        )
        self._record.gone()

    async def _introduce(self, channel: Channel, send: Sender) -> None:
        self._cursor.put(self._encoder.preamble())
        # A link has checksums of its own. Disks have none, and what goes one way may end, and lie, on one.
        self._owed.stable = not channel.features.two_way
        features = (stream.PAGE_DIGESTS,) if self._owed.stable else ()
        description = self._machine.description.encode()
        self._cursor.put(self._encoder.hello(self._memory.n_pages, description, features))
        await send()
        if channel.features.two_way:
            await self._peer.hear(stream.Kind.ACCEPT, self._limits.setup_timeout)

    async def _wait_for_leave(self) -> None:
        limits = self._limits
        patience = math.inf  # and a limit of time that cancels does so here too
        if limits.timeout is not None and limits.on_timeout == "force":
            patience = max(limits.timeout - self._record.elapsed, 0.0)
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
            self._record.note(f"the vCPUs stand still for {decision.throttle:.0%} of the time")

    async def _slow_down(self, share: float) -> None:
        if share != self._throttled:
            await self._machine.throttle(share)
            self._throttled = share

    async def _send_round(self, send: Sender) -> RoundFigures:
        """Send what is pending; then see what was written meanwhile."""
        self._record.begin_round()
        self._owed.begin()
        if not await send(self._owed.more, enough=self._is_forced):
            await self._owed.settle()
            await send()  # what is half sent: see _collect
        rate = self._record.rate()
        return self._record.end_round(await self._collect(), rate)

    async def _collect(self) -> int:
        """Read the dirty log into what is owed. Never while a frame is half sent: once that is accepted its
        pages are owed no more, and one that was written meanwhile would be forgotten with them."""
        assert self._cursor.empty
        return await trio.to_thread.run_sync(self._tracker.collect, self._pending)

    async def _say_go(self, send: Sender, *, accepted: Callable[[], None] | None = None) -> None:
        if self._machine.state is State.RUNNING:
            raise MigrationError(
                f"the guest {self._machine.state} although it was being handed over: somebody let it run, so "
                "the other side has not got the guest as it is now; migrate it again"
            )
        self._cursor.put(self._encoder.signal(stream.Kind.GO), accepted=accepted)
        await send()

    def _let_go(self) -> None:
        """The point of no return: called the moment that the last byte of "go" was accepted."""
        self._moved = True
        self._deadline.deadline = math.inf
        self._machine.mark_moved()
        self._record.note("the guest belongs to the other side")

    # -- those who may end it -----------------------------------------------------------------------

    async def _watch_guest(self) -> None:
        ending = await self._machine.wait()
        if not self._moved:
            raise GuestEnded(f"the guest ended before it had moved: {ending}")

    # -- figures ------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        self._record.enter(phase)
        if self._on_phase is not None:
            self._on_phase(phase)
        if self._channel is not None:
            self._channel.phase_changed(str(phase))


def _only_cancelled(problem: BaseException) -> bool:
    if isinstance(problem, BaseExceptionGroup):
        return all(_only_cancelled(part) for part in problem.exceptions)
    return isinstance(problem, trio.Cancelled)
