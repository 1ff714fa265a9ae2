"""Channels to and from a store: nothing is visible before the commit, and nothing is left without one."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.testing import CLOGGED_CHECKS, Check, Ends, Plan, check_plan, checks_for, plans
from kvmmig.testing._transfer import receive_all, send_all
from kvmmig.transport import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit import stored
from kvmmig.transport.toolkit.stored import in_thread, stored_receiver, stored_sender

PART = 1 << 16
DATA = random.Random(1).randbytes(5 * PART + 123)


class Store:
    """In memory. ``gates`` hold up what is named so until they are set."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.objects: list[list[bytes]] = []
        self.at_once = 0
        self.discards = 0
        self.gates: dict[str, trio.Event] = {}
        self.fails = ""

    async def _pass(self, what: str) -> None:
        await trio.lowlevel.checkpoint()
        if what == self.fails:
            raise OSError(28, "full")
        if what in self.gates:
            await self.gates[what].wait()

    async def put(self, number: int, data: memoryview) -> None:
        self.at_once += 1
        try:
            await self._pass("put")
            self.parts[number] = bytes(data)
        finally:
            self.at_once -= 1

    async def commit(self, parts: int) -> None:
        await self._pass("commit")
        self.commit_now(parts)

    def commit_now(self, parts: int) -> None:
        assert sorted(self.parts) == list(range(parts))
        self.objects.append([self.parts.pop(number) for number in range(parts)])

    async def discard(self) -> None:
        assert self.at_once == 0
        self.discards += 1
        await self._pass("discard")
        self.parts.clear()

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[SendChannel]:
        async with stored_sender(
            self.put, self.commit, self.discard, peer="the store", part_size=PART, parallel=3
        ) as sender:
            yield sender

    @asynccontextmanager
    async def receiver(self) -> AsyncIterator[ReceiveChannel]:
        if not self.objects:
            raise ConnectFailed("nothing is stored")
        parts = self.objects[-1]

        async def get(number: int) -> bytes:
            await trio.lowlevel.checkpoint()
            return parts[number]

        async with stored_receiver(get, len(parts), peer="the store") as receiver:
            yield receiver


@asynccontextmanager
async def ends(store: Store | None = None) -> AsyncIterator[Ends]:
    place = store or Store()
    async with trio.open_nursery() as nursery:

        async def host(task_status: trio.TaskStatus[ReceiveChannel]) -> None:
            async with place.receiver() as receiver:
                task_status.started(receiver)
                await trio.sleep_forever()

        async def receive() -> ReceiveChannel:
            try:
                receiver: ReceiveChannel = await nursery.start(host)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            return receiver

        async with place.sender() as sender:
            yield Ends(sender, receive, stored=True)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("check", checks_for(stores=True))
async def test_the_suite(check: Check) -> None:
    await check(ends)


@pytest.mark.parametrize("check", CLOGGED_CHECKS)
async def test_the_suite_on_a_store_that_hangs(check: Check) -> None:
    store = Store()
    store.gates["put"] = trio.Event()
    await check(lambda: ends(store))


@given(plan=plans())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(plan: Plan) -> None:
    await check_plan(ends, plan)


async def test_parts_have_one_size_but_the_last_and_appear_with_the_commit() -> None:
    store = Store()
    async with store.sender() as sender:
        await send_all(sender, DATA)
        await sender.flush()
        assert not store.objects
    assert [len(part) for part in store.objects[0]] == [PART] * 5 + [123]
    assert (b"".join(store.objects[0]), store.discards) == (DATA, 0)


async def test_so_many_parts_are_put_at_a_time_and_no_more_are_held() -> None:
    store = Store()
    store.gates["put"] = trio.Event()
    accepted = 0
    async with store.sender() as sender:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    nonlocal accepted
                    while True:
                        accepted += await sender.send_some([memoryview(DATA)])

                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert (accepted, store.at_once) == (3 * PART, 3)
        sender.abort()


@pytest.mark.parametrize("where", ["put", "commit"])
async def test_an_end_while_the_store_hangs_leaves_nothing(where: str) -> None:
    store = Store()
    store.gates[where] = trio.Event()
    async with store.sender() as sender:
        await sender.send_some([memoryview(b"abc")])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.aclose)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(ChannelClosed):
            await sender.send_some([memoryview(b"abc")])
    assert (store.objects, store.parts, store.discards) == ([], {}, 1)


async def test_an_abort_ends_an_aclose_that_hangs_in_the_commit() -> None:
    store = Store()
    store.gates["commit"] = trio.Event()
    async with store.sender() as sender, trio.open_nursery() as nursery:

        async def close() -> None:
            with pytest.raises(ChannelClosed):
                await sender.aclose()

        await sender.send_some([memoryview(b"abc")])
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        sender.abort()
    assert (store.objects, store.parts, store.discards) == ([], {}, 1)


@pytest.mark.parametrize(
    ("where", "sentence"),
    [("put", r"can't put part \d into the store"), ("commit", "can't commit the store")],
)
async def test_what_fails_in_the_store_breaks_the_channel_and_leaves_nothing(
    where: str, sentence: str
) -> None:
    store = Store()
    store.fails = where
    with pytest.raises(ChannelBroken, match=f"^{sentence}: no space is left") as caught:
        async with store.sender() as sender:
            await send_all(sender, DATA)
    assert isinstance(caught.value.__cause__, OSError)
    assert (store.objects, store.parts, store.discards) == ([], {}, 1)


async def test_a_cancelled_commit_that_ends_well_within_its_grace_has_been_one(
    autojump_clock: trio.abc.Clock,
) -> None:
    store = Store()

    async def commit(parts: int) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.3)
        store.commit_now(parts)

    async with stored_sender(store.put, commit, store.discard, peer="the store") as sender:
        await sender.send_some([memoryview(b"abc")])
        with trio.move_on_after(0.1) as scope:
            await sender.aclose()
        assert not scope.cancelled_caught
    assert (store.objects, store.discards) == ([[b"abc"]], 0)


async def test_a_discard_that_hangs_is_left_behind_and_told(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.abc.Clock
) -> None:
    store = Store()
    store.gates["discard"] = trio.Event()
    with caplog.at_level(logging.WARNING):
        async with store.sender() as sender:
            sender.abort()
    assert "what was put into the store could not be discarded: that took longer than 1 s" in caplog.text


async def test_a_missing_part_is_an_error_and_no_end() -> None:
    async def get(number: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if number:
            raise FileNotFoundError(2, "gone")
        return b"a"

    async with stored_receiver(get, 2, peer="the store") as receiver:
        with pytest.raises(ChannelBroken, match="can't get part 1 of the store: there is no such file"):
            await receive_all(receiver)
        receiver.abort()


async def cancelled(call: Callable[[], Awaitable[object]], begun: threading.Event) -> bool:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await trio.to_thread.run_sync(begun.wait)
                scope.cancel()

            nursery.start_soon(cancel)
            await call()
    return scope.cancelled_caught


async def test_a_call_in_a_thread_that_ends_soon_after_a_cancel_has_ended_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "_THREAD_GRACE", 60.0)  # soon is as soon as this host can
    begun, ended = threading.Event(), []

    def call() -> None:
        begun.set()
        threading.Event().wait(0.05)
        ended.append(True)

    await cancelled(in_thread(call), begun)
    assert ended == [True]


async def test_a_call_in_a_thread_that_hangs_is_left_behind() -> None:
    begun, alive = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        alive.wait(60)

    assert await cancelled(in_thread(call), begun)
    alive.set()


async def test_a_call_in_a_thread_returns_and_raises_as_it_does() -> None:
    assert await in_thread(lambda a, b: a + b)(1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)()
