"""What only a TCP connection can get wrong."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed
from kvmmig.transport import Channel, SendChannel, Transport, TransportURI

Make = Callable[[str | TransportURI], Transport]


@asynccontextmanager
async def _pair(transport: Make) -> AsyncIterator[tuple[Channel, Channel]]:
    async with (
        transport("tcp:127.0.0.1:0").listen() as listener,
        transport(listener.uri).connect() as sender,
        listener.accept() as receiver,
    ):
        assert isinstance(sender, Channel)
        assert isinstance(receiver, Channel)
        yield sender, receiver


async def _connect(transport: Transport) -> None:
    async with transport.connect():
        pass


async def _send_for_ever(channel: SendChannel) -> None:
    with trio.fail_after(60):
        while True:
            await channel.send_some([memoryview(b"more")])


@pytest.mark.parametrize(
    "target", ["", "4444", ":4444", "::1:4444", "host:", "host:x", "host:65536", "[::1]"]
)
def test_a_wrong_address_is_refused_with_the_right_form(target: str, transport: Make) -> None:
    with pytest.raises(BadURI, match="write tcp:HOST:PORT"):
        transport(f"tcp:{target}")


async def test_port_0_listens_on_a_port_that_the_uri_names(transport: Make) -> None:
    async with transport("tcp:localhost:0").listen() as listener:
        assert not listener.uri.target.endswith(":0")
        async with transport(listener.uri).connect() as sender:
            assert TransportURI("tcp", sender.peer) == listener.uri


async def test_nobody_there_is_one_sentence(transport: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        uri = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConnectFailed, match=f"can't connect to {uri}: nobody listens there"):
        await _connect(transport(uri))
    with pytest.raises(ConnectFailed, match=r"the host name 'nowhere.invalid' can't be resolved"):
        await _connect(transport("tcp:nowhere.invalid:4444"))
    with pytest.raises(ConnectFailed, match="port 0 is only for listening"):
        await _connect(transport("tcp:127.0.0.1:0"))


async def test_an_address_in_use_is_one_sentence(transport: Make) -> None:
    async with transport("tcp:127.0.0.1:0").listen() as listener:
        with pytest.raises(ConnectFailed, match=r"can't listen on .*: another process listens there already"):
            async with transport(listener.uri).listen():
                pass


async def test_a_port_can_be_listened_on_again_at_once(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        uri = TransportURI("tcp", sender.peer)
        await receiver.aclose()  # this side ends first, and so is left in TIME_WAIT
    async with transport(uri).listen() as again:
        assert again.uri == uri


async def test_accept_ends_when_the_listener_is_closed(transport: Make) -> None:
    async with trio.open_nursery() as nursery:
        async with transport("tcp:127.0.0.1:0").listen() as listener:

            async def accept() -> None:
                with pytest.raises(ConnectFailed, match="not listened on any more"):
                    async with listener.accept():
                        pass

            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
    await accept()


async def test_a_channel_outlives_its_listener(transport: Make) -> None:
    buffer = memoryview(bytearray(10))
    async with AsyncExitStack() as stack:
        async with transport("tcp:127.0.0.1:0").listen() as listener:
            sender = await stack.enter_async_context(transport(listener.uri).connect())
            receiver = await stack.enter_async_context(listener.accept())
        await sender.send_some([memoryview(b"still")])
        assert await receiver.receive_some(buffer) == 5


async def test_a_block_that_fails_resets_the_connection(transport: Make) -> None:
    async with transport("tcp:127.0.0.1:0").listen() as listener, AsyncExitStack() as stack:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it is the block that fails
            async with transport(listener.uri).connect():
                receiver = await stack.enter_async_context(listener.accept())
                raise ZeroDivisionError
        with pytest.raises(ChannelBroken, match="the other side cut the connection"):
            await receiver.receive_some(memoryview(bytearray(1)))
        receiver.abort()


async def test_flush_waits_for_the_other_sides_kernel(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        chunk = memoryview(bytes(1 << 20))
        accepted = 0

        async def send() -> None:
            nonlocal accepted
            while True:
                accepted += await sender.send_some([chunk])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(0.2)
            nursery.cancel_scope.cancel()
        with trio.move_on_after(0.1) as waiting:
            await sender.flush()
        assert waiting.cancelled_caught  # its own kernel still holds what does not fit into the other's
        got = 0
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.flush)
                buffer = memoryview(bytearray(1 << 20))
                while got < accepted:
                    got += await receiver.receive_some(buffer)
        sender.abort()
        receiver.abort()


async def test_flush_fails_when_the_other_side_is_gone(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        await sender.send_some([memoryview(bytes(1 << 20))])
        receiver.abort()
        with trio.fail_after(60), pytest.raises(ChannelBroken, match="the other side cut the connection"):
            await sender.flush()
        sender.abort()


async def test_an_abort_is_never_an_orderly_end(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        sender.abort()
        for _ in range(2):  # the kernel itself says so only once
            with pytest.raises(ChannelBroken, match="the other side cut the connection"):
                await receiver.receive_some(memoryview(bytearray(1)))
        await receiver.aclose()


async def test_aclose_says_that_the_other_side_did_not_get_everything(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        await sender.send_some([memoryview(b"half")])
        receiver.abort()
        with pytest.raises(ChannelBroken):
            await _send_for_ever(sender)
        with pytest.raises(ChannelBroken):
            await sender.aclose()
        await sender.aclose()


async def test_two_ways_at_once(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        await sender.send_some([memoryview(b"ready?")])
        await receiver.send_some([memoryview(b"ready")])
        buffer = memoryview(bytearray(100))
        assert await receiver.receive_some(buffer) == 6
        assert await sender.receive_some(buffer) == 5
        assert sender.two_way


async def test_many_small_buffers_go_in_one_call(transport: Make) -> None:
    async with _pair(transport) as (sender, receiver):
        pages = [memoryview(bytes(4096))] * 2000  # more than one system call can take
        accepted = await sender.send_some(pages)
        assert accepted == 1024 * 4096, "what one system call can take, whole buffers"
        sender.abort()
        receiver.abort()
