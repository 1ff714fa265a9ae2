"""Connecting and listening: cancels, one source after the other, the listener's end, and junk clients."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress

import trio
import trio.testing

from kvmmig.errors import ConnectFailed, TransportError
from kvmmig.testing._ends import (
    Hosts,
    Maker,
    Nonconformance,
    NotApplicable,
    hosting,
    met,
    promise,
    towards,
    transports,
)
from kvmmig.testing._transfer import raises, receive_some_of, require, send_all
from kvmmig.testing.leftovers import left_after, leftovers
from kvmmig.transport import Listener, ReceiveChannel, SendChannel, Transport

_MOMENTS = (0, 1, 2, 3, 5, 8)  # turns of the loop after which a connect is cancelled
_SILENT = 3  # clients
_HELD_UP = 8.0  # seconds: less than a handshake may take
_GONE = 10.0  # seconds for the last of what a cancel has ended
_HOST_PORT = re.compile(r"\[?(?P<host>[^/\]]*?)\]?:(?P<port>[0-9]+)(/.*)?")


@promise
async def check_cancelled_accept(maker: Maker) -> None:
    """A cancelled accept accepts nobody: the listener is as usable as before."""
    async with _listening(maker) as (hosts, source, listener):
        with trio.CancelScope() as scope:
            scope.cancel()
            async with listener.accept():
                raise Nonconformance("accept gave a channel though nobody has connected")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_accept_nobody, listener)
            await trio.testing.wait_all_tasks_blocked(0.02)
            nursery.cancel_scope.cancel()
        sender, receiver = await met(hosts, source, listener)
        await _talk(sender, receiver, b"after a cancel")


@promise
async def check_second_accept(maker: Maker) -> None:
    """A listener takes one source after the other; each channel leads to its own."""
    async with _listening(maker) as (hosts, source, listener):
        first = await met(hosts, source, listener)
        second = await _met_again(hosts, source, listener)
        await _talk(*second, b"from the second")
        await _talk(*first, b"from the first")


@promise
async def check_channels_outlive_their_listener(maker: Maker) -> None:
    """Channels that a listener has accepted live on when its block is left."""
    async with hosting() as outer:
        async with _listening(maker) as (_, source, listener):
            sender, receiver = await met(outer, source, listener)
        await _talk(sender, receiver, b"the listener is gone")


@promise
async def check_listener_that_ends_while_accepting(maker: Maker) -> None:
    """An accept that waits while its listener's block is left raises ConnectFailed."""

    async def accept() -> None:
        with raises(ConnectFailed, "accept of a listener whose block has been left"):
            async with listener.accept():
                raise Nonconformance("accept gave a channel though nobody has connected")

    async with trio.open_nursery() as nursery:
        async with _listening(maker) as (_, _, listener):
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked(0.02)


@promise
async def check_connect_to_nobody(maker: Maker) -> None:
    """Where nobody listens, connect raises ConnectFailed."""
    given, _ = transports(maker)
    if given is not None:
        raise NotApplicable("the source's transport does not follow from the destination's")
    async with _listening(maker) as (_, source, _):
        pass
    with raises(ConnectFailed, "connecting to where nobody listens any more"):
        async with source.connect():
            pass


@promise
async def check_cancelled_connect_leaves_nothing(maker: Maker) -> None:
    """A cancelled connect leaves nothing behind, and hinders nobody who connects after it."""
    async with _listening(maker) as (hosts, source, listener):
        before = leftovers()
        for turns in _MOMENTS:
            await _connect_cancelled(source, turns)
        left = await left_after(before, _GONE)
        require(not left, f"cancelled connects have left behind: {', '.join(sorted(left))}")
        await _connects_in_spite_of(len(_MOMENTS), hosts, source, listener)


@promise
async def check_junk_clients_are_survived(maker: Maker) -> None:
    """Clients that go away at once, or talk nonsense, hinder nobody who connects after them."""
    async with _listening(maker) as (hosts, source, listener):
        for junk in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 256):
            stream = await _raw_client(listener)
            with suppress(trio.BrokenResourceError), trio.move_on_after(0.1):
                if junk:
                    await stream.send_all(junk)
            await stream.aclose()
        await _connects_in_spite_of(4, hosts, source, listener)


@promise
async def check_silent_clients_hold_up_nobody(maker: Maker) -> None:
    """Clients that connect and say nothing hold up nobody who connects after them."""
    word, found, turn = b"the one that speaks", trio.Event(), trio.Lock()

    async def accept(listener: Listener) -> None:
        async with AsyncExitStack() as stack:
            async with nullcontext() if listener.several else turn:
                channel = await stack.enter_async_context(listener.accept())
            with suppress(TransportError):
                if await receive_some_of(channel, len(word)) == word:
                    found.set()
                    await trio.sleep_forever()
            channel.abort()

    async with _listening(maker) as (hosts, source, listener):
        crowd = [await _raw_client(listener) for _ in range(_SILENT)]
        with trio.move_on_after(_HELD_UP):
            async with trio.open_nursery() as nursery:
                for _ in range(_SILENT + 1):
                    nursery.start_soon(accept, listener)
                sender = await hosts.enter(source.connect)
                await send_all(sender, word)
                await sender.flush()
                await found.wait()
                nursery.cancel_scope.cancel()
        for stream in crowd:
            await trio.aclose_forcefully(stream)
        require(found.is_set(), f"{_SILENT} silent clients held up a source for {_HELD_UP:g} s")


@asynccontextmanager
async def _listening(maker: Maker) -> AsyncIterator[tuple[Hosts, Transport, Listener]]:
    """A listener, whose block is left at the end of this, and the source's transport."""
    source, destination = transports(maker)
    if destination.stores or destination.arrives_at_once:
        raise NotApplicable("nobody connects to where it listens")
    async with hosting() as inner, hosting() as outer:
        listener = await outer.enter(destination.listen)
        yield inner, source or towards(destination, listener.uri), listener


async def _met_again(
    hosts: Hosts, source: Transport, listener: Listener
) -> tuple[SendChannel, ReceiveChannel]:
    try:
        return await met(hosts, source, listener)
    except* ConnectFailed as error:
        raise NotApplicable("no second source can connect") from error


async def _accept_nobody(listener: Listener) -> None:
    async with listener.accept():
        raise Nonconformance("accept gave a channel though nobody has connected")


async def _connect_cancelled(source: Transport, turns: int) -> None:
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel)
        with suppress(ConnectFailed):  # one that does not wait may have no patience with a busy listener
            async with source.connect():
                await trio.sleep_forever()


async def _connects_in_spite_of(others: int, hosts: Hosts, source: Transport, listener: Listener) -> None:
    """One connects, and the listener accepts it, after at most as many ``others`` as there were."""
    word = b"the one that means it"
    found = trio.Event()

    async def accept() -> None:
        for _ in range(others + 1):
            async with listener.accept() as channel:
                with suppress(TransportError):
                    if await receive_some_of(channel, len(word)) == word:
                        found.set()
                        await trio.sleep_forever()
                channel.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        sender = await hosts.enter(source.connect)
        await send_all(sender, word)
        await sender.flush()
        await found.wait()
        nursery.cancel_scope.cancel()


async def _talk(sender: SendChannel, receiver: ReceiveChannel, word: bytes) -> None:
    await send_all(sender, word)
    await sender.flush()
    got = await receive_some_of(receiver, len(word))
    require(got == word, f"{word!r} was sent, {got!r} arrived")


async def _raw_client(listener: Listener) -> trio.SocketStream:
    """Connects a bare socket to where it listens, if that is a socket."""
    target = listener.uri.target
    if await trio.Path(target).is_socket():
        return await trio.open_unix_socket(target)
    if (found := _HOST_PORT.fullmatch(target)) is not None:
        host, port = found["host"] or "127.0.0.1", int(found["port"])
        return await trio.open_tcp_stream(host, port)
    raise NotApplicable(f"no bare socket connects to {listener.uri}")
