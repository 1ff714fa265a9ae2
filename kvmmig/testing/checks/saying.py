"""What a transport and its channels say of themselves: attributes, counters, knobs, URIs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from kvmmig.errors import BadURI, KnobError
from kvmmig.testing._ends import (
    Maker,
    Nonconformance,
    NotApplicable,
    hosting,
    opened,
    promise,
    rebuilt,
    transports,
)
from kvmmig.testing._transfer import raises, require, send_all, transfer
from kvmmig.testing.leftovers import leftovers
from kvmmig.transport import ReceiveChannel, SendChannel, TransportURI, Wrapper

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9._-]*")
_NONSENSE = ("", "no such value \x00", "-1e999", "\N{SNOWMAN}")


@promise
async def check_attributes(maker: Maker) -> None:
    """peer, notices, copies, call_size and two_way are what the contract says, on both sides."""
    async with opened(maker) as ends:
        _, receiver = await transfer(ends, lambda sender: send_all(sender, b"x"))
        for side, channel in (("source", ends.sender), ("destination", receiver)):
            require(type(channel.peer) is str and channel.peer != "", f"{side}: peer says {channel.peer!r}")
            require(_texts(channel.notices), f"{side}: notices are {channel.notices!r}, not a tuple of texts")
            require(type(channel.two_way) is bool, f"{side}: two_way is {channel.two_way!r}")
            if isinstance(channel, SendChannel):
                require(type(channel.copies) is bool, f"{side}: copies is {channel.copies!r}")
                size = channel.call_size
                require(type(size) is int and size > 0, f"{side}: call_size is {size!r}, not a size in bytes")
        source, destination = ends.sender.two_way, receiver.two_way
        require(source == destination, f"two_way is {source} at the source, {destination} at the destination")
        require(not (source and ends.stored), "a store that is two-way: nobody answers from it")


@promise
async def check_counters_at_any_time(maker: Maker) -> None:
    """counters and waits_for never raise, not even after the end, and give names with numbers, and a text."""

    def look(channel: SendChannel | ReceiveChannel, when: str) -> None:
        counted = _never_raises(channel.counters, f"counters {when}")
        for name, value in dict(counted).items():
            require(_is_name(name), f"counters {when}: {name!r} is no name; write it as zstd.sent-bytes")
            good = isinstance(value, int | float) and not isinstance(value, bool)
            require(good, f"counters {when}: {name} is {value!r}, not a number")
        waits = _never_raises(channel.waits_for, f"waits_for {when}")
        require(type(waits) is str, f"waits_for {when} returned {waits!r}, not a text")

    async with opened(maker) as ends:
        look(ends.sender, "at the beginning")
        _, receiver = await transfer(ends, lambda sender: send_all(sender, b"x" * 1000))
        for channel in (ends.sender, receiver):
            look(channel, "after the end of the stream")
            channel.abort()
            look(channel, "after abort")


@promise
async def check_knobs(maker: Maker) -> None:
    """A knob takes the value that it has. For a value that makes no sense it raises KnobError and stays."""
    async with opened(maker) as ends:
        for name, knob in ends.sender.knobs.items():
            require(_is_name(name), f"{name!r} is no name for a knob; write it as throttle.rate")
            value = _never_raises(knob.value, f"the value of {name}")
            require(type(value) is str, f"the value of {name} is {value!r}, not a text")
            try:
                knob.turn(value)
            except Exception as error:
                raise Nonconformance(
                    f"{name} can't be turned to its own value {value!r}: {error!r}"
                ) from error
            require(knob.value() == value, f"{name} stands at {knob.value()!r} when turned to {value!r}")
            for nonsense in _NONSENSE:
                with raises(KnobError, f"turning {name} to {nonsense!r}"):
                    knob.turn(nonsense)
                require(knob.value() == value, f"{name} has changed though turning it raised KnobError")


@promise
async def check_uris(maker: Maker) -> None:
    """A transport is cheap to make; its URI as text means the same; an option that it has not is a BadURI."""
    for transport in transports(maker):
        if transport is None:
            continue
        uri = transport.uri
        require(isinstance(uri, TransportURI), f"uri is {uri!r}, not a TransportURI")
        before = leftovers()
        again = rebuilt(transport, TransportURI.parse(str(uri)))
        left = leftovers() - before
        require(not left, f"making a transport has opened something: {', '.join(sorted(left))}")
        require(
            again.uri == uri, f"from {str(uri)!r} comes a transport whose uri is {again.uri!r}, not {uri!r}"
        )
        require(type(again.stores) is bool, f"stores is {again.stores!r}")
        require(type(again.arrives_at_once) is bool, f"arrives_at_once is {again.arrives_at_once!r}")
        require(again.stores == transport.stores, "stores differs between two transports of the same URI")
        wrapper = f"{uri.wrappers[0]}." if uri.wrappers else ""
        bad = replace(uri, options={**uri.options, f"{wrapper}no-such-option": "1"})
        with raises(BadURI, f"making a transport from {str(bad)!r}"):
            if isinstance(transport, Wrapper):
                type(transport)(bad, transport.inner)
            else:
                type(transport)(bad)


@promise
async def check_listener_says_where(maker: Maker) -> None:
    """Listener.uri is a TransportURI, and text that means the same."""
    _, destination = transports(maker)
    if destination.stores:
        raise NotApplicable("the transport stores: nobody connects to where it listens")
    async with hosting() as hosts:
        listener = await hosts.enter(destination.listen)
        uri = listener.uri
        require(isinstance(uri, TransportURI), f"Listener.uri is {uri!r}, not a TransportURI")
        require(TransportURI.parse(str(uri)) == uri, f"Listener.uri reads {str(uri)!r}, which means another")


def _never_raises(call: Callable[[], T], what: str) -> T:
    try:
        return call()
    except Exception as error:
        raise Nonconformance(f"{what} raised {error!r}; it never raises") from error


def _is_name(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(text) is str for text in value)
