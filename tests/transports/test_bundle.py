"""Several connections as one channel: strays are passed over, and one that breaks is the end of all."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed
from kvmmig.transport import Channel, Listener, ReceiveChannel, Transport, TransportURI
from kvmmig.transport.toolkit import bundle

Make = Callable[[str | TransportURI], Transport]


def _port(listener: Listener) -> tuple[str, int]:
    host, _, port = listener.uri.target.rpartition(":")
    return host, int(port)


def _hello(number: int, count: int, identity: bytes = b"i" * 16) -> bytes:
    return bundle._HELLO.pack(bundle._MAGIC, identity, number, count)


@asynccontextmanager
async def _pair(transport: Make, lanes: int) -> AsyncIterator[tuple[Channel, Channel]]:
    async with (
        transport(f"tcp:127.0.0.1:0?lanes={lanes}").listen() as listener,
        transport(listener.uri).connect() as sender,
        listener.accept() as receiver,
    ):
        assert isinstance(sender, Channel)
        assert isinstance(receiver, Channel)
        yield sender, receiver


async def _send_for_ever(transport: Transport) -> None:
    async with transport.connect() as sender:
        while True:
            await sender.send_some([memoryview(bytes(100))])


async def _receive(channel: ReceiveChannel, size: int) -> bytes:
    got = memoryview(bytearray(size))
    done = 0
    while done < size:
        count = await channel.receive_some(got[done:])
        assert count
        done += count
    return bytes(got)


async def test_the_uri_that_is_listened_on_has_the_lanes_for_the_other_side(transport: Make) -> None:
    async with transport("tcp:127.0.0.1:0?lanes=2").listen() as listener:
        assert str(listener.uri).endswith("?lanes=2")


@pytest.mark.parametrize("value", ["0", "17", "two", ""])
def test_a_number_of_lanes_that_cannot_be_is_refused(value: str, transport: Make) -> None:
    with pytest.raises(BadURI, match="lanes"):
        transport(f"tcp:127.0.0.1:0?lanes={value}")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n", "came without lanes; have it say lanes=2"),
        (_hello(0, 3), "came with lanes=3, not with lanes=2"),
        (_hello(2, 2), "not with lanes=2"),
        (_hello(0, 2) + _hello(0, 2), None),
        (b"kvm", "ended before it had said what comes"),
        (b"", "ended before it had said what comes"),
    ],
)
async def test_a_stray_is_passed_over(
    said: bytes, sentence: str | None, transport: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(60):
        async with transport("tcp:127.0.0.1:0?lanes=2").listen() as listener:
            with socket.create_connection(_port(listener)) as stray:
                stray.sendall(said)
                stray.shutdown(socket.SHUT_WR)
                async with transport(listener.uri).connect() as sender, listener.accept() as receiver:
                    await sender.send_some([memoryview(b"it is me")])
                    assert await _receive(receiver, 8) == b"it is me"
    assert sentence is None or sentence in caplog.text


async def test_one_who_knows_a_bundles_name_takes_no_place_in_it_twice(
    transport: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(60):
        async with transport("tcp:127.0.0.1:0?lanes=2").listen() as listener:
            socks = [socket.create_connection(_port(listener)) for _ in range(3)]
            for sock, number in zip(socks, (0, 0, 1), strict=True):
                sock.sendall(_hello(number, 2))
            async with listener.accept():
                assert "is no part of the bundle that it names" in caplog.text
            for sock in socks:
                sock.close()


async def test_a_source_without_lanes_is_told_to_have_some(
    transport: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(60), trio.CancelScope() as scope:
        async with transport("tcp:127.0.0.1:0?lanes=2").listen() as listener:
            plain = transport(TransportURI("tcp", listener.uri.target))
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    async with listener.accept():
                        pytest.fail("it was accepted")

                nursery.start_soon(accept)
                with pytest.raises(ChannelBroken):
                    await _send_for_ever(plain)
                scope.cancel()
    assert "have it say lanes=2" in caplog.text


async def test_incomplete_bundles_are_bounded_and_end_with_the_listener(transport: Make) -> None:
    with trio.fail_after(60):
        async with transport("tcp:127.0.0.1:0?lanes=2").listen() as listener:
            socks = [socket.create_connection(_port(listener)) for _ in range(20)]
            for number, sock in enumerate(socks):
                sock.sendall(_hello(0, 2, number.to_bytes(16, "big")))
            async with transport(listener.uri).connect(), listener.accept():
                for sock in socks[:4]:  # the oldest made room
                    with pytest.raises(ConnectionResetError):
                        sock.recv(1)
        for sock in socks[4:]:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        for sock in socks:
            sock.close()


async def test_one_connection_that_breaks_is_the_end_of_both_sides(transport: Make) -> None:
    with trio.fail_after(60):
        async with _pair(transport, 3) as (sender, receiver):
            await sender.send_some([memoryview(b"first")])
            assert await _receive(receiver, 5) == b"first"
            sender._members[2].abort()  # type: ignore[attr-defined]
            with pytest.raises(ChannelBroken):
                await _receive(receiver, 1)
            receiver.abort()
            sender.abort()


async def test_chunks_that_come_before_their_turn_are_kept_while_the_first_is_late(transport: Make) -> None:
    """The first connection stops in the middle of a chunk; what the others have brought is not lost."""
    data = bytes(range(256)) * (48 << 10)  # 12 MiB: three chunks
    async with transport("tcp:127.0.0.1:0?lanes=3").listen() as listener:
        socks = [socket.create_connection(_port(listener)) for _ in range(3)]
        for number, sock in enumerate(socks):
            sock.sendall(_hello(number, 3))
        with trio.fail_after(60):
            async with listener.accept() as receiver:
                parts = [data[at : at + (4 << 20)] for at in range(0, len(data), 4 << 20)]
                framed = [len(part).to_bytes(8, "little") + part for part in parts]

                def send(sock: socket.socket, what: bytes) -> None:
                    sock.sendall(what)

                got = memoryview(bytearray(len(data)))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.to_thread.run_sync, send, socks[0], framed[0][:100_000])
                    for sock, frame in zip(socks[1:], framed[1:], strict=True):
                        nursery.start_soon(trio.to_thread.run_sync, send, sock, frame)
                    done = 0
                    while done < 100_000 - 8:
                        done += await receiver.receive_some(got[done:])
                    assert done == 100_000 - 8, "not a byte of what comes behind it"
                    with trio.move_on_after(0.3) as scope:
                        await receiver.receive_some(got[done:])
                    assert scope.cancelled_caught, "there is nothing to have yet"
                    nursery.start_soon(trio.to_thread.run_sync, send, socks[0], framed[0][100_000:])
                    while done < len(data):
                        done += await receiver.receive_some(got[done:])
                assert got == data
        for sock in socks:
            sock.close()


async def test_nobody_there_is_one_sentence(transport: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        uri = f"tcp:127.0.0.1:{taken.getsockname()[1]}?lanes=2"
    with pytest.raises(ConnectFailed, match="nobody listens there"):
        async with transport(uri).connect():
            pass
