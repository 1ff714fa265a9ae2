"""Whatever a stranger's channel does, its machine stays under control: it answers, and is not lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count

import pytest
import trio

from kvmmig.errors import MigrationCancelled, OutcomeUnknown, WrongState
from kvmmig.testing import MemoryTransport
from kvmmig.transport import Channel, Listener, PassingChannel, TransportURI, on_phase
from kvmmig.transport.contract import AnyChannel
from tests.monitor.lab import PATIENCE, awaiting, check, running

pytestmark = pytest.mark.kvm
Slip = Callable[[], Awaitable[None]]
NUMBERS = count()


class BadChannel(PassingChannel):
    """Slips before it sends, once it is told to, and when it is closed."""

    def __init__(self, below: AnyChannel, slip: Slip, *, sends_badly: bool = False) -> None:
        super().__init__(below)
        self.sends_badly = sends_badly
        self._slip = slip

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        if self.sends_badly:
            await self._slip()
        return await super().send_some(buffers)

    async def aclose(self) -> None:
        await super().aclose()
        await self._slip()


class BadSource(MemoryTransport):
    """Its channel slips from a phase on."""

    def __init__(self, uri: TransportURI, slip: Slip, phase: str) -> None:
        super().__init__(uri)
        self._slip = slip
        self._phase = phase

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        async with super().connect() as channel:
            bad = BadChannel(channel, self._slip)

            def enters(phase: str) -> None:
                bad.sends_badly |= phase == self._phase

            on_phase(enters)
            yield bad


class BadDestination(MemoryTransport):
    """Its channel slips when it is closed."""

    def __init__(self, uri: TransportURI, slip: Slip) -> None:
        super().__init__(uri)
        self._slip = slip

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with super().listen() as listener:
            yield BadListener(listener, self._slip)


class BadListener(Listener):
    def __init__(self, inner: Listener, slip: Slip) -> None:
        self.uri = inner.uri
        self._inner = inner
        self._slip = slip

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        async with self._inner.accept() as channel:
            yield BadChannel(channel, self._slip)


async def raise_one() -> None:
    raise RuntimeError("a slip")


async def leave_the_program() -> None:
    raise SystemExit(3)


@contextmanager
def no_threads_left() -> Iterator[None]:
    """All threads that trio lends to whoever has no limiter of their own are lost, as to a dead disk."""
    limiter = trio.to_thread.current_default_thread_limiter()
    borrowers = [object() for _ in range(int(limiter.available_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        yield
    finally:
        for borrower in borrowers:
            limiter.release_on_behalf_of(borrower)


@pytest.fixture
def uri() -> TransportURI:
    return TransportURI("memory", f"monitor-{next(NUMBERS)}")


@pytest.mark.parametrize("slip", [raise_one, leave_the_program])
async def test_after_go_the_machine_stays_until_an_operator_has_decided(
    slip: Slip, uri: TransportURI
) -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await there.control.incoming.listen(MemoryTransport(uri), exit_on_error=False)
            here.control.outgoing.begin(BadSource(uri, slip, "handed-over"))
            with pytest.raises(OutcomeUnknown, match="Look there first"):
                await here.control.outgoing.wait()
            assert await here("query-status") == {"status": "postmigrate", "running": False}
            with pytest.raises(WrongState, match="moved away"):
                await here("cont")
            await here("x-kvmmig-take-back")
            assert (await here("query-status"))["running"]
            await check(here.control)


@pytest.mark.parametrize("slip", [raise_one, leave_the_program])
async def test_an_arrived_guest_is_safe_from_its_channel(slip: Slip, uri: TransportURI) -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await there.control.incoming.listen(BadDestination(uri, slip))
            here.control.outgoing.begin(MemoryTransport(uri))
            await here.control.outgoing.wait()
            await there.control.incoming.wait()
            assert there.control.run_state() == "running"
            await check(there.control)


async def test_a_call_that_nothing_ends_is_left_behind_and_the_guest_goes_on(uri: TransportURI) -> None:
    stuck, let_go = trio.Event(), trio.Event()

    async def stay() -> None:
        with trio.CancelScope(shield=True):
            stuck.set()
            await let_go.wait()

    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await there.control.incoming.listen(MemoryTransport(uri), exit_on_error=False)
            here.control.outgoing.begin(BadSource(uri, stay, "rounds"))
            await stuck.wait()
            assert (await here("query-migrate"))["status"] == "active"
            await here("migrate_cancel")
            with pytest.raises(MigrationCancelled):
                await here.control.outgoing.wait()
            assert (await here("query-status"))["running"]
            await check(here.control)
            let_go.set()


async def test_a_pause_and_a_cancel_need_no_thread_that_others_may_have_lost(uri: TransportURI) -> None:
    with trio.fail_after(PATIENCE):
        async with awaiting() as there, running() as here:
            await there.control.incoming.listen(MemoryTransport(uri), exit_on_error=False)
            here.control.dirty_rate.begin(60)
            await here("migrate-set-parameters", max_bandwidth=1_000_000)
            with no_threads_left():
                await here("stop")
                await here("cont")
                await here.control.dirty_rate.end()
            here.control.outgoing.begin(MemoryTransport(uri))
            await here.until_status("active")
            await here.until(lambda: here.control.outgoing.migration.statistics().sent_bytes)  # type: ignore[union-attr]  # one runs
            with no_threads_left():
                await here("migrate_cancel")
                await here.until_status("cancelled")
                assert (await here("query-status"))["running"]
                await here("stop")
            await check(here.control)
