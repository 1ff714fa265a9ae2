"""The migration task: a running guest leaves through a channel, in bounded steps.

Its phases are a table, `kvmmig.migration.phases`. What holds throughout:

- **A step** is a trio cancel scope around "send from the cursor until the round or the time is up". It ends
  by itself, whether the sink is always ready or never: it needs no EAGAIN and no bandwidth limit.
- **Nothing is lost.** Reading the dirty log clears it, so what was read stays in ``pending`` until the
  channel has accepted the last byte of its frame.
- **One side runs.** Until "go" is offered, any error or cancel leaves the source as it was, running if it
  ran: what was done is undone by an exit stack, which gets each thing the moment that it is done.
- **Channels are not trusted.** All that uses one is in a task of its own, which is left behind where it can't
  be ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from kvmmig import stream
from kvmmig.errors import (
    ChannelBroken,
    ConnectFailed,
    GuestEnded,
    KnobError,
    KvmmigError,
    MigrationCancelled,
    MigrationError,
    MigrationRefused,
    WrongState,
)
from kvmmig.machine.states import State
from kvmmig.migration.causes import alone, as_error, was_cancelled
from kvmmig.migration.events import RecordedEvent
from kvmmig.migration.pagemap import PageMap
from kvmmig.migration.peer import Peer
from kvmmig.migration.phases import PHASES, Phase
from kvmmig.migration.policy import (
    Limits,
    Policy,
    RoundFigures,
    default_policy,
)
from kvmmig.migration.precopy import MigratableMachine, PreCopy
from kvmmig.migration.recorder import Recorder
from kvmmig.migration.report import MigrationStatistics
from kvmmig.migration.steps import because
from kvmmig.migration.undo import Undo
from kvmmig.migration.welcome import check_destination
from kvmmig.transport import Knob, Transport, TransportURI, transport_for
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.peers import named
from kvmmig.transport.phases import collecting
from kvmmig.transport.supervision import connected, supervised
from kvmmig.transport.toolkit import own_tasks

T = TypeVar("T")
_log = logging.getLogger(__name__)
#: Seconds that a cancel from outside leaves "go" for its way: who has the guest is to get its last byte too.
_GRACE = 0.05


class OutgoingMigration:
    """One migration of one machine to one place. `run` it once; watch it by `statistics` meanwhile."""

    def __init__(
        self,
        machine: MigratableMachine,
        transport: Transport | TransportURI | str,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        pause_before_switchover: bool = False,
        keep_running: bool = False,
        on_phase: Callable[[Phase], None] | None = None,
        on_round: Callable[[RoundFigures], None] | None = None,
        on_event: Callable[[RecordedEvent], None] | None = None,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        """``transport`` may be a URI, which raises `BadURI` here where it is not understood.

        With ``pause_before_switchover`` the guest stands still after the last round until `proceed` is
        called. With ``keep_running`` the guest is only saved, and goes on here; a transport that does not
        store is a `MigrationError` then. ``on_phase`` is told each phase as it begins, ``on_round`` each
        round's figures as it ends, ``on_event`` all that a record has (docs/record.md): on the event loop, so
        they must be quick and not raise. ``record`` is a file to append that to.
        """
        self._machine = machine
        self._transport = transport if isinstance(transport, Transport) else transport_for(transport)
        if keep_running and not self._transport.stores:
            raise MigrationError(
                f"{self._transport.uri} stores nothing, so the guest would run there and here; only a guest "
                "that is saved can go on running here"
            )
        self._peer_name = str(self._transport.uri)
        self._peer = Peer(self._peer_name, lambda: self.phase)
        self._recorder = Recorder("source", on_event, record)
        self._precopy = PreCopy(
            machine,
            name=self._peer_name,
            policy=policy if policy is not None else default_policy(stores=self._transport.stores),
            limits=limits if limits is not None else Limits(),
            pause_before_switchover=pause_before_switchover,
            as_image=self._transport.random_access,
            keep_running=keep_running,
            enter=self._enter,
            let_go=self._let_go,
            resume=self._resume,
            on_round=on_round,
            recorder=self._recorder,
        )
        self._record = self._precopy.record
        self._channel: GuardedChannel | None = None
        self._scope = trio.CancelScope()
        self._channel_lied = False
        self._reason: KvmmigError | None = None  # why ``_scope`` was cancelled
        self._on_phase = on_phase
        self._phase_listeners: list[Callable[[str], None]] = []

    # -- what others may ask ------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where it is."""
        return self._record.phase

    def statistics(self) -> MigrationStatistics:
        """The figures as they are at this moment."""
        work = self._precopy
        return self._record.statistics(
            peer=self._peer_name,
            total_pages=self._machine.memory.n_pages,
            remaining_pages=len(work.pending),
            step_bound=work.limits.step,
            bandwidth=work.bucket.rate,
            throttle=work.throttled,
            counters=self._channel.counters() if self._channel is not None else {},
        )

    def cancel(self, why: str = "it was cancelled") -> None:
        """End the migration: `run` raises `MigrationCancelled`, and the guest goes on here.

        Raises `MigrationError` once "go" has been offered: from there on the guest belongs to the other side.
        """
        if PHASES[self.phase].on_cancel is None:
            raise MigrationError("the guest has been handed over; it is too late to cancel the migration")
        self._recorder.changed("cancel", why)
        self._end(MigrationCancelled(f"the migration to {self._peer_name} ended: {why}"))

    def set_bandwidth(self, bytes_per_second: float | None) -> None:
        """Change the limit while the migration runs; None is no limit. `ValueError` unless it is positive."""
        self._precopy.set_bandwidth(bytes_per_second)
        self._recorder.changed("bandwidth", bytes_per_second)

    def set_policy(self, policy: Policy) -> None:
        """Have another policy decide, from the end of this round on. What the former one wanted is undone."""
        self._precopy.policy = policy
        self._recorder.changed("policy", type(policy).__name__)

    def proceed(self) -> None:
        """Go on from the pre-switchover phase. `MigrationError` in any other one."""
        if self.phase is not Phase.PRE_SWITCHOVER:
            raise MigrationError(
                f"the migration is in its {self.phase} phase; it waits to be told to proceed only in "
                f"the {Phase.PRE_SWITCHOVER} phase"
            )
        self._recorder.changed("proceed")
        self._precopy.proceed.set()

    def page_map(self, blocks: int) -> PageMap:
        """What is pending and what was sent, for each of ``blocks`` parts of the guest's memory or fewer.

        `ValueError` unless ``blocks`` is positive.
        """
        return self._precopy.pages.page_map(blocks)

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """What can be turned on the channel now: ``{"throttle.rate": ...}``."""
        return self._channel.knobs if self._channel is not None else {}

    def turn(self, knob: str, value: str) -> None:
        """Turn one of `knobs`. `KnobError` where there is no such knob, or not such a value."""
        if self._channel is None:
            raise KnobError(f"there is no {knob!r} to turn: the migration has no channel yet")
        self._channel.turn(knob, value)
        self._recorder.changed(knob, value)

    async def run(self, strays: trio.Nursery | None = None) -> MigrationStatistics:
        """Migrate. Returns the final figures once the guest has moved.

        Raises a `TransportError`, `StreamError` or `MigrationError` when it has not: then dirty logging is
        off, the channel is aborted, and the guest runs if it ran before. A cancel leaves the same. The one
        exception is `OutcomeUnknown`, whose text says what an operator must find out.

        What a channel does that can't be ended is left behind in ``strays``, a nursery that outlives the
        migration; without one, this waits for it, as all of trio does.
        """
        if self._machine.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"the guest {self._machine.state}, so it can't be migrated; only a running or paused one can"
            )
        async with AsyncExitStack() as stack:
            if strays is None:
                strays = await stack.enter_async_context(own_tasks())
            await stack.enter_async_context(self._recorder.recording(self.statistics))
            self._precopy.note_begin(str(self._transport.uri))
            with self._record.running():
                try:
                    await self._watched(strays)
                except BaseException as problem:
                    error = self._verdict(problem)
                    if error is problem:
                        raise
                    if error is not None:
                        raise error from problem
                else:
                    self._enter(Phase.DONE)
        return self.statistics()

    # -- how it ends --------------------------------------------------------------------------------

    def _end(self, reason: KvmmigError) -> None:
        if self._reason is None:
            self._reason = reason
            self._scope.cancel()

    def _verdict(self, problem: BaseException) -> BaseException | None:
        """Enter the phase that ends it, as the table says. Returns what to raise; None where all is well."""
        problem = alone(problem)
        row = PHASES[self.phase]
        if row.on_error is Phase.UNKNOWN and (
            self._record.is_gone or self._peer.has_said(stream.Kind.RUNNING)
        ):
            self._enter(Phase.DONE)
            return None if isinstance(problem, Exception) else problem
        stored = self._transport.stores and self.phase is Phase.COMMIT and self._channel_lied
        error = as_error(problem, self.phase, self._peer_name, may_have_stored=stored)
        self._record.error = str(error) or type(error).__name__
        end = (was_cancelled(problem) and row.on_cancel) or row.on_error
        if end is not None:
            self._enter(end)
        return error

    async def _watched(self, strays: trio.Nursery) -> None:
        """Migrate beside those who may end it: the guest, a limit of time, `cancel`."""
        limits = self._precopy.limits
        with self._scope:
            async with own_tasks() as watchers, Undo(self._record.note) as undo:
                watchers.start_soon(self._watch_guest)
                if limits.timeout is not None and limits.on_timeout == "cancel":
                    watchers.start_soon(self._watch_time, limits.timeout)
                try:
                    await supervised(
                        partial(self._migrate, strays, undo),
                        strays,
                        stuck=lambda: self._channel.stuck() if self._channel is not None else "",
                        patience=lambda: _GRACE if self.phase is Phase.HANDED_OVER else 0.0,
                    )
                finally:
                    if self._channel is not None:  # what was left behind may come back, and must not go on
                        self._channel_lied = self._channel.is_broken_contract
                        self._channel.fail(f"the migration to {self._peer_name} has ended")
                        self._channel.abort()
        if self._reason is not None and self._scope.cancelled_caught:
            raise self._reason

    async def _watch_guest(self) -> None:
        ending = await self._machine.wait()
        if self._precopy.keep_running and self._record.is_gone:
            return  # it went on after it was saved
        if PHASES[self.phase].on_cancel is not None:
            self._end(GuestEnded(f"the guest ended before it had moved: {ending}"))

    async def _watch_time(self, seconds: float) -> None:
        await trio.sleep(seconds)
        if PHASES[self.phase].on_cancel is not None:
            self._end(
                MigrationError(
                    f"the migration to {self._peer_name} took longer than {seconds:g} s"
                    f"{because(self._channel)}"
                )
            )

    # -- the task -----------------------------------------------------------------------------------

    async def _migrate(self, strays: trio.Nursery, undo: Undo) -> None:
        self._enter(Phase.SETUP)
        async with self._connected(strays) as channel:
            check_destination(channel)
            self._peer_name = named(channel.peer, channel.identity) or self._peer_name
            self._peer = peer = Peer(self._peer_name, lambda: self.phase)
            self._record.notices = channel.notices
            self._channel = channel
            stores = self._transport.stores
            await self._beside_the_peer(
                strays, channel, lambda: self._precopy.hand_over(channel, peer, undo, stores=stores)
            )

    @asynccontextmanager
    async def _connected(self, strays: trio.Nursery) -> AsyncIterator[GuardedChannel]:
        async with AsyncExitStack() as stack:
            with (
                trio.move_on_after(self._precopy.limits.connect_timeout) as scope,
                collecting(self._phase_listeners),
            ):
                access = self._transport.random_access
                channel = await stack.enter_async_context(
                    connected(self._transport, strays, random_access=access)
                )
            if scope.cancelled_caught:
                raise ConnectFailed(
                    f"{self._transport.uri} gave no connection in {self._precopy.limits.connect_timeout:g} s"
                )
            self._tell_listeners()
            yield channel

    async def _beside_the_peer(
        self, strays: trio.Nursery, channel: GuardedChannel, work: Callable[[], Awaitable[None]]
    ) -> None:
        """Do ``work`` while the other side is listened to, which may end it."""
        failures: list[KvmmigError] = []

        async def attempt(call: Callable[[], Awaitable[None]]) -> None:
            try:
                await call()
            except KvmmigError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async def last_words_too() -> None:
            try:
                await work()
            except ChannelBroken:
                if channel.two_way:  # its last words explain more than a broken pipe does
                    await self._peer.last_words(0.5)
                raise
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            if channel.two_way:
                listen = partial(self._peer.listen, channel)
                nursery.start_soon(attempt, partial(supervised, listen, strays))
            nursery.start_soon(attempt, last_words_too)

        refusals = [failure for failure in failures if isinstance(failure, MigrationRefused)]
        for failure in refusals or failures:
            raise failure

    def _let_go(self) -> None:
        """The point of no return."""
        if self._reason is not None:
            raise self._reason
        self._recorder.part("flush")
        self._enter(Phase.HANDED_OVER)
        self._machine.mark_moved()
        self._record.note("the guest belongs to the other side")

    async def _resume(self) -> None:
        if PHASES[self.phase].on_cancel is None:
            return  # it is the other side's
        try:
            await self._machine.resume()
        except WrongState:  # it was ended meanwhile, by somebody who may
            return

    def _enter(self, phase: Phase) -> None:
        self._record.enter(phase)
        if self._on_phase is not None:
            self._on_phase(phase)
        self._tell_listeners()

    def _tell_listeners(self) -> None:
        for listener in self._phase_listeners:
            try:
                listener(str(self.phase))
            except Exception:
                _log.exception("a listener of %s failed in the phase %s", self._transport.uri, self.phase)
