"""Pre-copy: rounds while the guest runs, the rest while it stands still, and the hand-over."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol, TypeVar

import trio

from kvmmig import stream
from kvmmig.errors import MigrationError
from kvmmig.machine.cpu import Ending
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.machine import State
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.migration.commit import bounded, commit
from kvmmig.migration.pages import PendingPages
from kvmmig.migration.peer import Peer
from kvmmig.migration.phases import Phase
from kvmmig.migration.policy import Continue, Decision, GiveUp, Limits, Policy, RoundFigures, Stop
from kvmmig.migration.record import Record
from kvmmig.migration.steps import Sender
from kvmmig.migration.undo import Undo
from kvmmig.transport import SendChannel
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.toolkit.rate import TokenBucket
from kvmmig.units import RATE, SHARE

T = TypeVar("T")

#: Seconds that a stop takes besides the dirty log and the pages: vCPUs parked, the state read here and set
#: there, the words of the hand-over. Measured on an idle host; a busy one may take several times that.
_STOPPING = 0.010


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
    def thread_ids(self) -> Sequence[int]: ...
    @property
    def description(self) -> Described: ...
    def dirty_tracker(self) -> DirtyTracker: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def capture(self) -> Sequence[StateSection]: ...
    async def wait(self) -> Ending: ...
    def mark_moved(self) -> None: ...
    async def throttle(self, share: float) -> None: ...


class PreCopy:
    """One guest on its way through one channel: `hand_over` does all of it, once."""

    def __init__(
        self,
        machine: MigratableMachine,
        *,
        name: str,
        policy: Policy,
        limits: Limits,
        pause_before_switchover: bool,
        enter: Callable[[Phase], None],
        let_go: Callable[[], None],
        resume: Callable[[], Awaitable[None]],
        on_round: Callable[[RoundFigures], None] | None,
    ) -> None:
        """``enter`` is told each phase; ``let_go`` is called at the point of no return, and may refuse.

        ``resume`` is to let the guest go on that was paused here. ``name`` is the other side's, for errors.
        """
        self._machine = machine
        self._name = name
        self.policy = policy
        self.limits = limits
        self.proceed = trio.Event()
        if not pause_before_switchover:
            self.proceed.set()
        self._enter = enter
        self._let_go = let_go
        self._resume = resume
        self._on_round = on_round
        self.pending = PageSet(machine.memory.n_pages)
        self._tracker = machine.dirty_tracker()
        self._encoder = stream.Encoder(stream.Direction.FORWARDS)
        self._cursor = stream.Cursor()
        self.record = Record(self._encoder, self._cursor, lambda: machine.thread_ids)
        self.pages = PendingPages(machine.memory, self.pending, self._encoder, self._cursor)
        self.bucket = TokenBucket(limits.bandwidth)
        #: The share of time for which the vCPUs stand still.
        self.throttled = 0.0
        # Its own: threads that others have lost to a dead disk must not keep a guest from going on.
        self._limiter = trio.CapacityLimiter(1)

    def set_bandwidth(self, bytes_per_second: float | None) -> None:
        """Change the limit; None is no limit. `ValueError` unless it is positive."""
        self.bucket.rate = bytes_per_second
        self.limits = replace(self.limits, bandwidth=bytes_per_second)

    async def hand_over(self, channel: GuardedChannel, peer: Peer, undo: Undo, *, stores: bool) -> None:
        """From the first byte to the other side's word that it has the guest.

        What must be undone where this does not come to its end goes to ``undo``.
        """
        undo.push("end its threads", self.pages.settle)
        self.record.stores = stores
        send = Sender(channel, self._cursor, self.record, self.limits, self.bucket)
        await self._introduce(channel, peer, send)
        self.record.set_up()

        self._enter(Phase.ROUNDS)
        undo.push("end dirty logging", partial(self._in_thread, self._tracker.stop))
        await self._in_thread(self._tracker.start)
        self.pending.fill()  # each page is sent once at least, whatever a tracker finds
        await self._collect()
        undo.push("let the vCPUs run all the time", partial(self._slow_down, 0.0))
        await self._rounds(channel, peer, send)

        self._enter(Phase.STOP if self.proceed.is_set() else Phase.PRE_SWITCHOVER)
        running = self._machine.state is State.RUNNING
        self.record.stopping()
        if running:
            undo.push("let the guest go on", self._resume)
            await self._machine.pause()
            self.record.lap("pause")
        if self.record.phase is Phase.PRE_SWITCHOVER:
            await self._wait_to_proceed()
            self.record.lap("waiting to proceed")
            self._enter(Phase.STOP)
        # Reading state can write guest memory, so the last dirty log comes after it.
        sections = await self._machine.capture()
        self.record.lap("state")
        await self._collect()
        self.record.lap("dirty log")

        self._enter(Phase.FINAL)
        self.record.begin_round()
        self.pages.begin()
        await send(self.pages.more)
        for section in sections:
            self._cursor.put(
                self._encoder.section(stream.Section(section.name, section.version, section.data))
            )
        self._cursor.put(self._encoder.end(running=running))
        await send()

        self._enter(Phase.COMMIT)
        if channel.two_way:  # one way, what is flushed is an affair of the commit
            await self._make_safe(channel, peer)
        self.record.end_final_pass()
        self.record.lap("memory")
        await commit(
            channel,
            peer,
            stores=stores,
            send_go=partial(self._send_go, send),
            let_go=self._let_go,
            patience=self.limits.handover_timeout,
        )
        self.record.gone()

    async def _rounds(self, channel: GuardedChannel, peer: Peer, send: Sender) -> None:
        """While the guest runs, until the policy wants it stopped, or time is up."""
        policy, decision = await self._begin_policy()
        while not isinstance(decision, Stop):
            figures = await self._send_round(channel, peer, send)
            if self._on_round is not None:
                self._on_round(figures)
            if self._is_out_of_time():
                self.record.note(
                    f"{self.limits.timeout:g} s are over: the guest is stopped, whatever is left"
                )
                return
            if self.policy is not policy:
                policy, decision = await self._begin_policy()
                if isinstance(decision, Stop):
                    return
            decision = policy.decide(figures)
            await self._obey(decision)

    async def _introduce(self, channel: SendChannel, peer: Peer, send: Sender) -> None:
        self._cursor.put(self._encoder.preamble())
        # A link has checksums of its own. Disks have none, and what goes one way may end, and lie, on one.
        self.pages.stable = self.limits.page_digests or not channel.two_way
        features = (stream.PAGE_DIGESTS,) if self.pages.stable else ()
        description = self._machine.description.encode()
        self._cursor.put(self._encoder.hello(self._machine.memory.n_pages, description, features))
        await send()
        if channel.two_way:
            await peer.hear(stream.Kind.ACCEPT, self.limits.setup_timeout)

    async def _wait_to_proceed(self) -> None:
        with trio.move_on_after(self._time_left()):
            await self.proceed.wait()

    async def _begin_policy(self) -> tuple[Policy, Decision]:
        policy = self.policy
        self.bucket.rate = self.limits.bandwidth
        await self._slow_down(0.0)
        beginning = policy.start()
        await self._obey(beginning)
        return policy, beginning

    async def _obey(self, decision: Decision) -> None:
        if isinstance(decision, GiveUp):
            raise MigrationError(f"the migration to {self._name} was given up: {decision.reason}")
        self._check(decision)
        if decision.bandwidth is not None:
            # The user's own limit holds, whatever a policy wants.
            self.bucket.rate = min(decision.bandwidth, self.limits.bandwidth or math.inf)
        if isinstance(decision, Continue) and decision.throttle is not None:
            await self._slow_down(decision.throttle)
            self.record.note(f"the vCPUs stand still for {decision.throttle:.0%} of the time")

    def _check(self, decision: Continue | Stop) -> None:
        try:
            if decision.bandwidth is not None:
                RATE.check(decision.bandwidth, "a bandwidth")
            if isinstance(decision, Continue) and decision.throttle is not None:
                SHARE.check(decision.throttle, "the vCPUs' share of time without running")
        except ValueError as error:
            raise MigrationError(
                f"the migration to {self._name} was given up: its policy wants what can't be: {error}"
            ) from error

    async def _slow_down(self, share: float) -> None:
        if share != self.throttled:
            await self._machine.throttle(share)
            self.throttled = share

    async def _send_round(self, channel: GuardedChannel, peer: Peer, send: Sender) -> RoundFigures:
        """Send what is pending; then see what was written meanwhile."""
        self.record.begin_round()
        self.pages.begin()
        if await send(self.pages.more, enough=self._is_out_of_time):
            await self._make_safe(channel, peer)
        else:
            await self.pages.settle()
            await send()  # what is half sent: see _collect
        self.record.sent_round()
        return self.record.end_round(await self._collect())

    async def _make_safe(self, channel: GuardedChannel, peer: Peer) -> None:
        """A round is over when the other side's kernel, or the disk, has it: so its rate is what was reached.

        What a disk takes its time for is done while the guest runs, and not when it stands still.
        """
        with self.record.waits.on("channel"), trio.move_on_after(self._time_left()):
            await bounded(
                channel, peer, channel.flush, "did not take the last bytes", self.limits.handover_timeout
            )

    async def _collect(self) -> int:
        """Read the dirty log into what is pending. Never while a frame is half sent: once that is accepted
        its pages are pending no more, and one that was written meanwhile would be forgotten with them."""
        assert self._cursor.empty
        begin = perf_counter()
        count = await self._in_thread(self._tracker.collect, self.pending)
        self.record.overhead = _STOPPING + perf_counter() - begin
        return count

    async def _send_go(self, send: Sender, *, offering: Callable[[], None] | None = None) -> None:
        if self._machine.state is State.RUNNING:
            raise MigrationError(
                f"the guest {self._machine.state} although it was being handed over: somebody let it run, so "
                "the other side has not got the guest as it is now; migrate it again"
            )
        if offering is not None:
            offering()
        self._cursor.put(self._encoder.signal(stream.Kind.GO))
        await send()

    def _is_out_of_time(self) -> bool:
        return self._time_left() <= 0.0

    def _time_left(self) -> float:
        """Seconds until the guest is stopped, whatever is left; a limit that cancels sees to that itself."""
        limits = self.limits
        if limits.timeout is None or limits.on_timeout != "force":
            return math.inf
        return max(limits.timeout - self.record.elapsed, 0.0)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._limiter)
