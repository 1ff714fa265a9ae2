"""Pre-copy: rounds while the guest runs, the rest while it stands still, and the hand-over."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Protocol, TypeVar

import trio

from kvmmig import stream
from kvmmig.errors import MigrationError
from kvmmig.machine.cpu import Ending
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import State
from kvmmig.migration.commit import bounded, commit
from kvmmig.migration.forms import Form, ImageForm, StreamForm
from kvmmig.migration.peer import Peer
from kvmmig.migration.phases import Phase
from kvmmig.migration.policy import Continue, Decision, GiveUp, Limits, Policy, RoundFigures, Stop
from kvmmig.migration.record import Record
from kvmmig.migration.recorder import Recorder
from kvmmig.migration.steps import Sender
from kvmmig.migration.undo import Undo
from kvmmig.transport import SendChannel
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.toolkit.rate import TokenBucket
from kvmmig.units import RATE, SHARE

T = TypeVar("T")

#: Seconds without a byte for the other side, after which it gets one.
_SIGN_OF_LIFE = 5.0
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
    def exits(self) -> Mapping[str, int]: ...
    @property
    def description(self) -> Described: ...
    def dirty_tracker(self) -> DirtyTracker: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def capture(self) -> Sequence[StateSection]: ...
    async def forget_capture(self) -> None: ...
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
        as_image: bool,
        keep_running: bool,
        enter: Callable[[Phase], None],
        let_go: Callable[[], None],
        resume: Callable[[], Awaitable[None]],
        on_round: Callable[[RoundFigures], None] | None,
        recorder: Recorder,
    ) -> None:
        """``enter`` is told each phase; ``let_go`` is called at the point of no return, and may refuse.

        Written ``as_image`` it needs a channel with random access, else one for a stream. ``keep_running`` is
        for a store: the guest goes on here as soon as nobody reads its memory any more.

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
        self._as_image = as_image
        self.keep_running = keep_running
        form = ImageForm if as_image else StreamForm
        self._form: Form = form(machine.memory, self.pending, lambda: machine.description.encode())
        self._cursor = self._form.cursor
        self._recorder = recorder
        self.record = Record(self._form.counts, self._cursor, lambda: machine.thread_ids, recorder)
        self.pages = self._form.pages
        self.bucket = TokenBucket(limits.bandwidth)
        self._sent_at = -math.inf  # when the other side last got anything, more or less
        #: The share of time for which the vCPUs stand still.
        self.throttled = 0.0
        # Its own: threads that others have lost to a dead disk must not keep a guest from going on.
        self._limiter = trio.CapacityLimiter(1)

    def note_begin(self, uri: str) -> None:
        """Have it recorded that it begins."""
        machine, policy = self._machine.description.encode(), type(self.policy).__name__
        self._recorder.begun(uri, self._form.identity, machine, policy, self.limits)
        self._recorder.watch_exits(lambda: self._machine.exits)

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
        self.record.watch_sending(self._recorder.watch(stores=stores, waits_for=channel.waits_for))
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
            await self._wait_to_proceed(send, two_way=channel.two_way)
            self.record.lap("waiting to proceed")
            self._enter(Phase.STOP)
        # Reading state can write guest memory, so the last dirty log comes after it.
        undo.push("take what is typed again", self._machine.forget_capture)
        sections = await self._machine.capture()
        self.record.lap("state")
        await self._collect()
        self.record.lap("dirty log")

        self._enter(Phase.FINAL)
        self.record.begin_round()
        self.pages.begin()
        await send(self.pages.more)
        if self._as_image:  # its tables may lie where the first of its pieces was written
            await self._bounded(channel, peer, channel.settle)
        self._form.finish(sections, running=running)
        await send()

        self._enter(Phase.COMMIT)
        if channel.two_way:  # one way, what is flushed is an affair of the commit
            await self._make_safe(channel, peer, durable=True)
        self.record.end_final_pass()
        self.record.lap("memory")
        if self.keep_running:
            await self._go_on(channel, peer, running=running)
        await commit(
            channel,
            peer,
            stores=stores,
            send_go=partial(self._send_go, send),
            let_go=self._let_go if not self.keep_running else lambda: None,
            patience=self.limits.handover_timeout,
        )
        if not self.keep_running:
            self.record.gone()

    async def _go_on(self, channel: GuardedChannel, peer: Peer, *, running: bool) -> None:
        """All of the guest as it is now has been accepted; it may go on as soon as nobody reads it any more.
        A stream's pages are copies. What is left to be done is the disk's."""
        _check_stands(self._machine)
        if self._as_image:
            await self._bounded(channel, peer, channel.settle)
        if running:
            await self._resume()
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
                self._recorder.decided(figures.round, type(policy).__name__, None)
                return
            if self.policy is not policy:
                policy, decision = await self._begin_policy()
                if isinstance(decision, Stop):
                    return
            decision = policy.decide(figures)
            self._recorder.decided(figures.round, type(policy).__name__, decision)
            await self._obey(decision)

    async def _introduce(self, channel: SendChannel, peer: Peer, send: Sender) -> None:
        self._form.introduce(two_way=channel.two_way, page_digests=self.limits.page_digests)
        await send()
        if channel.two_way:
            await peer.hear(stream.Kind.ACCEPT, self.limits.setup_timeout)

    def _is_silent(self) -> bool:
        return trio.current_time() - self._sent_at >= _SIGN_OF_LIFE

    async def _give_sign_of_life(self, send: Sender) -> None:
        """Send a page once more: a destination gives up a source that is silent for long."""
        self.pending.add(0, 1)
        self.pages.begin()
        await send(self.pages.more)
        self._sent_at = trio.current_time()

    async def _wait_to_proceed(self, send: Sender, *, two_way: bool) -> None:
        until = trio.current_time() + self._time_left()
        while not self.proceed.is_set() and (left := until - trio.current_time()) > 0:
            with trio.move_on_after(min(left, _SIGN_OF_LIFE)):
                await self.proceed.wait()
            if two_way and self._is_silent():
                await self._give_sign_of_life(send)

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
        _check(decision, self._name)
        if decision.bandwidth is not None:
            # The user's own limit holds, whatever a policy wants.
            self.bucket.rate = min(decision.bandwidth, self.limits.bandwidth or math.inf)
        if isinstance(decision, Continue) and decision.throttle is not None:
            await self._slow_down(decision.throttle)
            self.record.note(f"the vCPUs stand still for {decision.throttle:.0%} of the time")

    async def _slow_down(self, share: float) -> None:
        if share != self.throttled:
            await self._machine.throttle(share)
            self.throttled = share

    async def _send_round(self, channel: GuardedChannel, peer: Peer, send: Sender) -> RoundFigures:
        """Send what is pending; then see what was written meanwhile."""
        self.record.begin_round()
        if self.pending:
            self._sent_at = trio.current_time()
        elif self._is_silent():
            await self._give_sign_of_life(send)
        self.pages.begin()
        if await send(self.pages.more, enough=self._is_out_of_time):
            await self._make_safe(channel, peer, durable=True)
        else:
            await self.pages.settle()
            await send()  # what is half sent: see _collect
            await self._make_safe(channel, peer, durable=False)
        self.record.sent_round()
        figures = self.record.end_round(await self._collect(), self.bucket.rate, self.throttled)
        self._recorder.page_map(figures.round, self.pages.page_map)
        return figures

    async def _make_safe(self, channel: GuardedChannel, peer: Peer, *, durable: bool) -> None:
        """A round is over when the other side's kernel, or the disk, has it: so its rate is what was reached.

        What a disk takes its time for is done while the guest runs, and not when it stands still. Before a
        page of an image is written again, its last write must have ended.
        """
        with self.record.waits.on("channel"):
            if self._as_image:
                await self._bounded(channel, peer, channel.settle)
            if durable:
                with trio.move_on_after(self._time_left()):
                    await self._bounded(channel, peer, channel.flush)

    async def _bounded(
        self, channel: GuardedChannel, peer: Peer, call: Callable[[], Awaitable[None]]
    ) -> None:
        await bounded(channel, peer, call, "did not take the last bytes", self.limits.handover_timeout)

    async def _collect(self) -> int:
        """Read the dirty log into what is pending. Never while a frame is half sent: once that is accepted
        its pages are pending no more, and one that was written meanwhile would be forgotten with them."""
        assert self._cursor.empty
        begin = perf_counter()
        count = await self._in_thread(self._tracker.collect, self.pending)
        self.record.overhead = _STOPPING + perf_counter() - begin
        self._recorder.dirty_log(begin, count)
        return count

    async def _send_go(self, send: Sender, *, offering: Callable[[], None] | None = None) -> None:
        if not self.keep_running:
            _check_stands(self._machine)
        if offering is not None:
            offering()
        self._form.go()
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


def _check(decision: Continue | Stop, to: str) -> None:
    try:
        if decision.bandwidth is not None:
            RATE.check(decision.bandwidth, "a bandwidth")
        if isinstance(decision, Continue) and decision.throttle is not None:
            SHARE.check(decision.throttle, "the vCPUs' share of time without running")
    except ValueError as error:
        raise MigrationError(
            f"the migration to {to} was given up: its policy wants what can't be: {error}"
        ) from error


def _check_stands(machine: MigratableMachine) -> None:
    if machine.state is State.RUNNING:
        raise MigrationError(
            f"the guest {machine.state} although it was being handed over: somebody let it run, so "
            "the other side has not got the guest as it is now; migrate it again"
        )
