"""Every channel that we ship passes the suite that we ship: a line here for each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    STORED_CHECKS,
    STREAM_CHECKS,
    Check,
    Ends,
    Maker,
    Plan,
    check_plan,
    memory_channel_pair,
    plans,
    stored_ends,
    stream_ends,
)
from kvmmig.transport import Channel, PassingChannel, Transport, TransportURI

Make = Callable[[str], Transport]

_STREAM = (*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS)
_STORED = (*CHECKS, *STORED_CHECKS)

# The other end is what `listen` says, behind the same wrappers.
STREAMS = (
    "tcp:127.0.0.1:0",
    "tcp:[::1]:0",
    "unix:{tmp}/a.sock",
    "throttle+tcp:127.0.0.1:0?throttle.rate=300MB/s",
    "throttle+unix:{tmp}/a.sock?throttle.latency=2ms&throttle.jitter=2ms",
    "throttle+tcp:127.0.0.1:0?throttle.rate=300MB/s&throttle.latency=1ms",
    "fault+tcp:127.0.0.1:0",
    "fault+tcp:127.0.0.1:0?fault.what=short&fault.at=5MiB&fault.for=20ms",
    "fault+unix:{tmp}/a.sock?fault.what=stall&fault.at=3&fault.for=20ms",
    "fault+throttle+tcp:127.0.0.1:0?fault.what=trickle&fault.side=receive&fault.seed=1&fault.for=20ms",
)
STORES = (
    "file:{tmp}/a.img",
    "file:{tmp}/a.img?direct=off",
    "pipe:{tmp}/a.img",
    "pipe:{tmp}/a.img?direct=off",
    "throttle+file:{tmp}/a.img?throttle.rate=500MB/s&throttle.latency=1ms",
    "fault+pipe:{tmp}/a.img?fault.what=stall&fault.at=1MiB&fault.for=20ms",
)


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def _uri(template: str, tmp_path: Path) -> str:
    return template.replace("{tmp}", str(tmp_path))


def _stream(uri: str, transport: Make) -> Maker:
    async def make() -> Ends:
        async with await transport(uri).listen() as listener:
            asked, found = TransportURI.parse(uri), TransportURI.parse(listener.uri)
            there = TransportURI(found.scheme, found.target, asked.options, asked.wrappers)
            return stream_ends(await transport(str(there)).connect(), await listener.accept())

    return make


def _stored(saving: Transport, reading: Transport) -> Maker:
    async def receive() -> Channel:
        async with await reading.listen() as listener:
            return await listener.accept()

    async def make() -> Ends:
        return stored_ends(await saving.connect(), receive)

    return make


def _exec(transport: Make, tmp_path: Path, options: str = "") -> Maker:
    saving = transport(f"exec:cat > {tmp_path}/a.img{options}")
    return _stored(saving, transport(f"exec:cat {tmp_path}/a.img"))


def _fds(sending: int, receiving: int, transport: Make) -> Maker:
    async def make() -> Ends:
        async with await transport(f"fd:{receiving}").listen() as listener:
            return stream_ends(await transport(f"fd:{sending}").connect(), await listener.accept())

    return make


def _pipe_fds(transport: Make) -> Maker:
    async def make() -> Ends:
        reading, writing = os.pipe()
        return await _fds(writing, reading, transport)()

    return make


def _socket_fds(transport: Make) -> Maker:
    async def make() -> Ends:
        ours, theirs = socket.socketpair()
        return await _fds(ours.detach(), theirs.detach(), transport)()

    return make


def _memory(capacity: int = 1 << 16) -> Maker:
    async def make() -> Ends:
        return stream_ends(*memory_channel_pair(capacity=capacity))

    return make


def _passing() -> Maker:
    async def make() -> Ends:
        sender, receiver = memory_channel_pair()
        return stream_ends(PassingChannel(sender), PassingChannel(receiver))

    return make


def _maker(name: str, transport: Make, tmp_path: Path) -> Maker:
    match name:
        case "memory":
            return _memory()
        case "passing":
            return _passing()
        case "fd of a pipe":
            return _pipe_fds(transport)
        case "fd of a socket":
            return _socket_fds(transport)
        case "exec":
            return _exec(transport, tmp_path)
        case store if store in STORES:
            saved = transport(_uri(store, tmp_path))
            return _stored(saved, saved)
        case stream:
            return _stream(_uri(stream, tmp_path), transport)


@pytest.mark.parametrize("check", _STREAM, ids=_name)
@pytest.mark.parametrize("name", ["memory", "passing", "fd of a pipe", "fd of a socket", *STREAMS])
async def test_streams(name: str, check: Check, transport: Make, tmp_path: Path) -> None:
    await check(_maker(name, transport, tmp_path))


@pytest.mark.parametrize("check", _STORED, ids=_name)
@pytest.mark.parametrize("name", STORES)
async def test_stores(name: str, check: Check, transport: Make, tmp_path: Path) -> None:
    await check(_maker(name, transport, tmp_path))


# What a command leaves of its file when it is killed is its own affair, so this is all for it.
@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize("options", ["", "?live=off"])
async def test_exec(options: str, check: Check, transport: Make, tmp_path: Path) -> None:
    await check(_exec(transport, tmp_path, options))


# Without the two that move megabytes.
@pytest.mark.parametrize("check", _STREAM[2:], ids=_name)
async def test_memory_that_holds_one_byte(check: Check) -> None:
    await check(_memory(capacity=1))


@pytest.mark.parametrize(
    "name", ["memory", "passing", "exec", "fd of a pipe", "fd of a socket", *STREAMS, *STORES]
)
@given(plan=plans())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(name: str, transport: Make, tmp_path: Path, plan: Plan) -> None:
    await check_plan(_maker(name, transport, tmp_path), plan)


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
@pytest.mark.parametrize("scheme", ["pipe", "exec"])
async def test_a_process_that_takes_nothing(
    scheme: str, check: Check, transport: Make, tmp_path: Path, program: Callable[[str], str]
) -> None:
    sleeper = program("exec sleep 1000")
    saved = transport(f"exec:{sleeper}" if scheme == "exec" else f"pipe:{tmp_path}/a.img?helper={sleeper}")
    await check(_stored(saved, saved))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
async def test_file_on_a_disk_that_hangs(
    check: Check, transport: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()

    def hang(fd: int, data: memoryview, offset: int) -> int:
        alive.wait()
        return len(data)

    monkeypatch.setattr(os, "pwrite", hang)
    saved = transport(f"file:{tmp_path}/a.img")
    await check(_stored(saved, saved))
    alive.set()
