"""What a transport's contexts do, and the tasks in them: connecting, listening, leaving, failing alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing

from kvmmig.errors import ChannelBroken, ConnectFailed, TransportError
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import Listener, PassingChannel, TransportURI, guard
from kvmmig.transport.supervision import connected
from tests.transports.odd import HELLO, WHO, Odd, connect, fail_with, listen, require_broken, use


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "GRACE", 0.1)


@pytest.mark.parametrize("rubbish", [None, 5, "channel", object()], ids=lambda value: type(value).__name__)
async def test_rubbish_where_a_channel_is_due(rubbish: object) -> None:
    with pytest.raises(ConnectFailed, match=f"{WHO} gave a .* from connect where a SendChannel is due"):
        await connect(Odd(lambda below: rubbish))


async def test_what_is_no_context_is_a_sentence() -> None:
    class NoContext(Odd):
        connect = cast(Any, lambda self: 5)
        listen = cast(Any, lambda self: None)

    with pytest.raises(ConnectFailed, match=f"{WHO} raised .* from connect"):
        await connect(NoContext())
    with pytest.raises(ConnectFailed, match=f"{WHO} raised .* from listen"):
        await listen(NoContext())


@pytest.mark.parametrize(
    "problem", [ValueError("odd"), SystemExit(1), ExceptionGroup("two", [ValueError("odd"), OSError("odd")])]
)
async def test_whatever_connect_raises_is_a_sentence(problem: BaseException) -> None:
    class Failing(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            await fail_with(problem)
            yield

        @asynccontextmanager
        async def listen(self) -> AsyncIterator[Any]:
            await fail_with(problem)
            yield

    with pytest.raises(ConnectFailed, match=f"{WHO} raised .* from connect; only a TransportError"):
        await connect(Failing())
    with pytest.raises(ConnectFailed, match=f"{WHO} raised .* from listen; only a TransportError"):
        await listen(Failing())


async def test_a_context_that_fails_when_it_is_left_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            async with super().connect() as channel:
                yield channel
            raise SystemExit(1)

    await connect(Failing())
    assert "odd-things" in caplog.text


async def test_a_context_that_is_left_by_itself_ends_its_channel() -> None:
    class Leaving(Odd):
        """Its nursery is cancelled while the channel is in use."""

        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            async with super().connect() as channel, trio.open_nursery() as nursery:
                self.nursery = nursery
                yield channel

    transport = Leaving()
    async with use(transport) as channel:
        await channel.send_some(HELLO)
        transport.nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ChannelBroken, match=f"{WHO} left its context by itself"):
            await channel.send_some(HELLO)


@pytest.mark.parametrize("problem", [ValueError("odd"), SystemExit(1), ChannelBroken("odd")])
@pytest.mark.parametrize("under_way", [True, False])
async def test_a_task_of_the_channels_that_fails_ends_the_channel(
    under_way: bool, problem: BaseException
) -> None:
    go = trio.Event()

    class Background(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            async def fail() -> None:
                await go.wait()
                raise problem

            async with super().connect() as channel, trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                yield channel

    async def receive() -> None:
        with pytest.raises(ChannelBroken, match="odd"):
            await channel.receive_some(memoryview(bytearray(1)))

    async with use(Background()) as channel, trio.open_nursery() as nursery:
        if under_way:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        await require_broken(channel, "odd")


async def test_a_context_that_does_not_end_when_told_is_cancelled(autojump_clock: object) -> None:
    cancelled = False

    class Staying(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            nonlocal cancelled
            async with super().connect() as channel:
                yield channel
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                cancelled = True
                raise

    await connect(Staying())
    assert cancelled


async def test_a_context_that_ignores_its_cancel_is_left_behind(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    release = trio.Event()

    class Deaf(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            async with super().connect() as channel:
                yield channel
            with trio.CancelScope(shield=True):
                await release.wait()

    async with trio.open_nursery() as strays:
        async with connected(Deaf(), strays):
            pass
        release.set()
    assert "does not leave connect; it is left behind" in caplog.text


@pytest.mark.parametrize("shield", [False, True])
async def test_a_connect_that_never_returns_can_be_cancelled(shield: bool, autojump_clock: object) -> None:
    release = trio.Event()

    class Hanging(Odd):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Any]:
            with trio.CancelScope(shield=shield):
                await release.wait()
            yield memory_channel_pair()[0]

    async with trio.open_nursery() as strays:
        began = trio.current_time()
        with trio.move_on_after(1) as scope:
            async with connected(Hanging(), strays):
                pass
        took = trio.current_time() - began
        release.set()
    assert scope.cancelled_caught
    assert took < 1.5


async def test_rubbish_where_a_listener_is_due() -> None:
    class Rubbish(Odd):
        @asynccontextmanager
        async def listen(self) -> AsyncIterator[Any]:
            yield 5

    with pytest.raises(ConnectFailed, match=f"{WHO} gave a int from listen where a Listener is due"):
        await listen(Rubbish())


@pytest.mark.parametrize("uri", [None, 5, "no uri"], ids=repr)
async def test_a_listener_whose_uri_is_none_is_a_sentence(uri: object) -> None:
    with pytest.raises(TransportError, match=f"{WHO}|not a transport URI"):
        await listen(_listener(uri=uri))


@pytest.mark.parametrize("problem", [ValueError("odd"), SystemExit(1)])
async def test_whatever_accept_raises_is_a_sentence(problem: BaseException) -> None:
    @asynccontextmanager
    async def accept() -> AsyncIterator[Any]:
        await fail_with(problem)
        yield

    with pytest.raises(ConnectFailed, match=f"{WHO} raised .* from accept; only a TransportError"):
        await listen(_listener(accept=accept), accept=True)


async def test_rubbish_from_accept_is_a_sentence() -> None:
    @asynccontextmanager
    async def accept() -> AsyncIterator[Any]:
        yield "a channel"

    with pytest.raises(ConnectFailed, match=f"{WHO} gave a str from accept where a ReceiveChannel is due"):
        await listen(_listener(accept=accept), accept=True)


@asynccontextmanager
async def _accept_one() -> AsyncIterator[Any]:
    yield PassingChannel(memory_channel_pair()[0])


def _listener(*, uri: object = TransportURI("odd", "a"), accept: Any = _accept_one) -> Odd:
    class OddListener(Listener):
        def __init__(self) -> None:
            self.uri = cast(TransportURI, uri)

        def accept(self) -> Any:
            return accept()

    class Listening(Odd):
        @asynccontextmanager
        async def listen(self) -> AsyncIterator[Listener]:
            yield OddListener()

    return Listening()
