"""Whatever a transport does, the guard makes a sentence of it that names the culprit; nothing else dies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import trio
import trio.testing

from kvmmig.errors import ChannelBroken, KnobError, TransportError
from kvmmig.transport import AnyChannel, Knob, PassingChannel, Transport, TransportURI, guard
from kvmmig.transport.guard import GuardedChannel
from kvmmig_transports.fault import FaultWrapper
from kvmmig_transports.throttle import ThrottleWrapper
from tests.transports.odd import CALLS, HELLO, WHO, Odd, connect, require_broken, use


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE", 0.1)


def _raising(method: str, problem: BaseException) -> type[PassingChannel]:
    """A channel one method of which raises."""

    def quick(self: object, *_: object) -> Any:
        raise problem

    async def slow(self: object, *_: object) -> Any:
        await trio.lowlevel.checkpoint()
        raise problem

    of_loop = method in ("abort", "waits_for", "counters")
    return type("Raising", (PassingChannel,), {method: quick if of_loop else slow})


def _returning(method: str, value: object) -> type[PassingChannel]:
    async def call(self: object, *_: object) -> object:
        await trio.lowlevel.checkpoint()
        return value

    return type("Returning", (PassingChannel,), {method: call})


COUNTS = [0, -1, 6, 900_000, True, 1.0, 1.5, None, "5", np.int64(3), b"5"]


@pytest.mark.parametrize("count", COUNTS, ids=repr)
async def test_a_count_that_is_none_of_send_some(count: object) -> None:
    async with use(Odd(_returning("send_some", count))) as channel:
        with pytest.raises(ChannelBroken, match=rf"{WHO} returned .* from send_some where 5 bytes"):
            await channel.send_some(HELLO)
        await require_broken(channel)


@pytest.mark.parametrize("count", COUNTS[1:], ids=repr)
async def test_a_count_that_is_none_of_receive_some(count: object) -> None:
    async with use(Odd(_returning("receive_some", count))) as channel:
        with pytest.raises(
            ChannelBroken, match=rf"{WHO} returned .* from receive_some into a buffer of 5 bytes"
        ):
            await channel.receive_some(memoryview(bytearray(5)))
        await require_broken(channel)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "problem",
    [
        ValueError("no such\nthing"),
        SystemExit(3),
        AssertionError(),
        BaseException("bare"),
        StopAsyncIteration("stop"),
        BaseExceptionGroup("two", [OSError(5, "bad disk"), SystemExit(1)]),
        ExceptionGroup("one", [ValueError("deep down")]),
    ],
    ids=lambda problem: type(problem).__name__,
)
async def test_any_exception_from_any_call_is_a_sentence(
    call: str, problem: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with use(Odd(_raising(call, problem))) as channel:
        with pytest.raises(ChannelBroken, match=WHO) as caught:
            await CALLS[call](channel)
    sentence = str(caught.value)
    assert f"from {call}; only a TransportError may come out of it" in sentence
    assert "\n" not in sentence
    assert any(record.exc_info for record in caplog.records), "its traceback is in the log"


@pytest.mark.parametrize("call", CALLS)
async def test_cancelled_though_nobody_cancelled(call: str) -> None:
    class OwnCancel(PassingChannel):
        pass

    async def cancelled(self: object, *_: object) -> Any:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                kept.append(error)
        raise kept[0]

    kept: list[trio.Cancelled] = []
    setattr(OwnCancel, call, cancelled)
    async with use(Odd(OwnCancel)) as channel:
        with pytest.raises(ChannelBroken, match=rf"{WHO} raised Cancelled from {call} where nobody had"):
            await CALLS[call](channel)


@pytest.mark.parametrize("call", CALLS)
async def test_a_group_with_a_cancel_in_it_tells_the_rest(call: str) -> None:
    async def fails(self: object, *_: object) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.lowlevel.checkpoint()
            raise ChannelBroken("the disk is full")

    async with use(Odd(type("Failing", (PassingChannel,), {call: fails}))) as channel:
        with pytest.raises(ChannelBroken, match=r"^the disk is full$"):
            await CALLS[call](channel)


@pytest.mark.parametrize("call", ["send_some", "receive_some", "flush"])
async def test_no_checkpoint_again_and_again(call: str) -> None:
    """It gets checkpoints for a while, and then it is broken. All the while others run."""

    async def at_once(self: object, *_: object) -> int:
        return 1

    async with use(Odd(type("AtOnce", (PassingChannel,), {call: at_once}))) as channel:
        async with _others() as turns:
            with pytest.raises(ChannelBroken, match=f"{WHO} returned from {call} 100 times without"):
                await _again_and_again(CALLS[call], channel)
    assert turns() > 90


async def test_one_return_without_a_checkpoint_now_and_then_is_healed() -> None:
    class NowAndThen(PassingChannel):
        calls = 0

        async def send_some(self, buffers: Sequence[memoryview]) -> int:
            self.calls += 1
            if self.calls % 3:
                await trio.lowlevel.checkpoint()
            return 5

    async with use(Odd(NowAndThen)) as channel, _others() as turns:
        await _again_and_again(CALLS["send_some"], channel)
    assert turns() > 900


async def test_a_cancel_forgets_nothing_that_was_accepted() -> None:
    class AtOnce(PassingChannel):
        async def send_some(self, buffers: Sequence[memoryview]) -> int:
            return 5

    async with use(Odd(AtOnce)) as channel:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await channel.send_some(HELLO) == 5


@pytest.mark.parametrize("call", CALLS)
async def test_a_cancel_from_outside_passes(call: str) -> None:
    async def waits(self: object, *_: object) -> None:
        await trio.sleep_forever()

    async with use(Odd(type("Waiting", (PassingChannel,), {call: waits}))) as channel:
        with trio.move_on_after(0.01) as scope:
            await CALLS[call](channel)
        assert scope.cancelled_caught
        assert not channel.stuck()


@pytest.mark.parametrize("call", ["send_some", "flush", "aclose"])
async def test_a_call_that_ignores_its_cancel_can_be_told(call: str, autojump_clock: object) -> None:
    release = trio.Event()

    async def ignores(self: object, *_: object) -> int:
        with trio.CancelScope(shield=True):
            await release.wait()
        return 1

    async def call_it() -> None:
        with trio.move_on_after(1):
            await CALLS[call](channel)

    async with use(Odd(type("Ignoring", (PassingChannel,), {call: ignores}))) as channel:
        channel.send_bound = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call_it)
            await trio.sleep(1.05)
            soon = channel.stuck()
            await trio.sleep(2)
            late = channel.stuck()
            release.set()
        assert soon == ""
        assert "odd-things" in late
        assert f"did not return from {call}" in late
        assert channel.stuck() == ""


async def test_a_second_call_does_not_hide_one_that_is_stuck(autojump_clock: object) -> None:
    """The second task is told ChannelBusy at once; the first is still there."""
    release = trio.Event()

    class Ignoring(PassingChannel):
        busy = False

        async def send_some(self, buffers: Sequence[memoryview]) -> int:
            if self.busy:
                raise ChannelBroken("busy")
            self.busy = True
            with trio.CancelScope(shield=True):
                await release.wait()
            return 1

    async def call_it() -> None:
        with trio.move_on_after(1):
            await channel.send_some(HELLO)

    async with use(Odd(Ignoring)) as channel, trio.open_nursery() as nursery:
        channel.send_bound = 1
        nursery.start_soon(call_it)
        await trio.sleep(0.5)
        with pytest.raises(ChannelBroken, match="busy"):
            await channel.send_some(HELLO)
        await trio.sleep(3)
        stuck = channel.stuck()
        release.set()
        assert "did not return from send_some" in stuck


@pytest.mark.parametrize("call", ["send_some", "flush", "aclose"])
@pytest.mark.parametrize("wrappers", ["throttle", "fault", "throttle+fault"])
async def test_a_stuck_channel_is_named_and_not_the_wrappers_around_it(
    wrappers: str, call: str, autojump_clock: object
) -> None:
    release = trio.Event()

    async def ignores(channel: PassingChannel, *offered: object) -> int:
        with trio.CancelScope(shield=True):
            await release.wait()
        return 1

    async def call_it() -> None:
        with trio.move_on_after(1):
            await CALLS[call](channel)

    transport: Transport = Odd(type("Ignoring", (PassingChannel,), {call: ignores}))
    for name in reversed(wrappers.split("+")):
        wrapper = {"throttle": ThrottleWrapper, "fault": FaultWrapper}[name]
        transport = wrapper(TransportURI("odd", "a", {}, (name,)), transport)
    async with use(transport) as channel:
        channel.send_bound = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call_it)
            await trio.sleep(4)
            late = channel.stuck()
            release.set()
        assert "odd-things" in late
        assert f"did not return from {call}" in late


@pytest.mark.parametrize("problem", [ValueError("odd"), SystemExit(1), ChannelBroken("it never raises")])
async def test_what_never_raises_never_raises(
    problem: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    for method, empty in (("waits_for", ""), ("counters", {}), ("abort", None)):
        caplog.clear()
        async with use(Odd(_raising(method, problem))) as channel:
            assert getattr(channel, method)() == empty
        assert f"failed in {method}, which must never raise" in caplog.text


@pytest.mark.parametrize("rubbish", [None, 5, [1], {"a": "b"}, {"a": None}], ids=repr)
async def test_rubbish_counters_are_none(rubbish: object) -> None:
    odd = type("Rubbish", (PassingChannel,), {"counters": lambda self: rubbish})
    async with use(Odd(odd)) as channel:
        assert channel.counters() == {}


async def test_a_knob_raises_nothing_but_its_own_error(caplog: pytest.LogCaptureFixture) -> None:
    class Knobs(PassingChannel):
        def __init__(self, below: AnyChannel) -> None:
            super().__init__(below)
            self.knobs = {"odd.rate": Knob(lambda: cast(str, 1 / 0), self.turn)}

        def turn(self, text: str) -> None:
            if text == "own":
                raise KnobError("not this one")
            raise SystemExit(text)

    async with use(Odd(Knobs)) as channel:
        with pytest.raises(KnobError, match=f"{WHO} raised SystemExit: 7 from turning odd.rate"):
            channel.turn("odd.rate", "7")
        with pytest.raises(KnobError, match=r"^not this one$"):
            channel.turn("odd.rate", "own")
        with pytest.raises(KnobError, match=r"there is no 'even.rate' .*; there are odd.rate \(\?\)"):
            channel.turn("even.rate", "7")


@pytest.mark.parametrize("rubbish", [None, 5, "knobs", {"a": None}, {5: 5}], ids=repr)
async def test_rubbish_knobs_raise_nothing_but_knob_errors(rubbish: object) -> None:
    odd = type("Rubbish", (PassingChannel,), {})

    def around(below: AnyChannel) -> PassingChannel:
        channel = odd(below)
        channel.knobs = rubbish
        return cast(PassingChannel, channel)

    async with use(Odd(around)) as channel:
        for name in ("a", "5"):
            with pytest.raises(KnobError):
                channel.turn(name, "1")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("notices", None), ("notices", 5), ("call_size", "much"), ("call_size", None)],
)
async def test_attributes_that_make_no_sense_are_a_sentence(attribute: str, value: object) -> None:
    def around(below: AnyChannel) -> PassingChannel:
        channel = PassingChannel(below)
        setattr(channel, attribute, value)
        return channel

    with pytest.raises(TransportError, match=WHO):
        await connect(Odd(around))


@asynccontextmanager
async def _others() -> AsyncIterator[Callable[[], int]]:
    """Says how often other tasks had their turn."""
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            await trio.lowlevel.checkpoint()
            ran += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        yield lambda: ran
        nursery.cancel_scope.cancel()


async def _again_and_again(
    call: Callable[[GuardedChannel], Awaitable[object]], channel: GuardedChannel
) -> None:
    for _ in range(1000):
        await call(channel)
