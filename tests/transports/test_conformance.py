"""Every transport passes the suite that we ship, as it is and through the guard: a line here for each."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
from hypothesis import HealthCheck, given, settings

from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    Check,
    Ends,
    Maker,
    Plan,
    check_plan,
    checks_for,
    plans,
    transport_ends,
)
from kvmmig.testing.memory import MemoryTransport
from kvmmig.transport import (
    AnyChannel,
    Listener,
    PassingChannel,
    SendChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
    transport_for,
)
from kvmmig.transport.supervision import connected, listening

# The source goes where the listener says that it is, in the same wrappers.
STREAMS = (
    "memory:a",
    "memory:a?capacity=1000",
    "passing+memory:a",
    "greeting+memory:a",
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
FDS = ("fd of a socket", "fd of a pipe")
STORES = (
    "file:{tmp}/a.img",
    "file:{tmp}/a.img?direct=off",
    "pipe:{tmp}/a.img",
    "pipe:{tmp}/a.img?direct=off",
    "throttle+file:{tmp}/a.img?throttle.rate=500MB/s&throttle.latency=1ms",
    "fault+pipe:{tmp}/a.img?fault.what=stall&fault.at=1MiB&fault.for=20ms",
)
GUARDED = ("memory:a", "tcp:127.0.0.1:0", "unix:{tmp}/a.sock", "file:{tmp}/a.img", "pipe:{tmp}/a.img")


class Passing(Wrapper):
    """Changes nothing."""

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        yield PassingChannel(channel)


class Greeting(Passing):
    """Has a handshake, for which both sides must be there, and a task of its own in each channel."""

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        passing = PassingChannel(channel)
        for sends in (side is Side.SOURCE, side is Side.DESTINATION):
            if sends:
                await passing.send_some([memoryview(b"!")])
            else:
                await passing.receive_some(memoryview(bytearray(1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield passing
            nursery.cancel_scope.cancel()


class Guarded(Wrapper):
    """As the engine sees a transport: through the guard."""

    strays: trio.Nursery

    def wrap(self, channel: AnyChannel, *, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
        raise AssertionError("the guard is around the transport, not around its channels")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with connected(self.inner, self.strays) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with listening(self.inner, self.strays) as listener:
            yield cast(Listener, listener)


OURS = {"passing": Passing, "greeting": Greeting, "guarded": Guarded}


def _transport(uri: TransportURI) -> Transport:
    if uri.wrappers and uri.wrappers[0] in OURS:
        return OURS[uri.wrappers[0]](uri, _transport(uri.unwrapped()[1]))
    return MemoryTransport(uri) if uri.scheme == "memory" else transport_for(uri)


def _fd(number: int) -> Transport:
    return transport_for(TransportURI("fd", str(number)))


def _pipe_fds() -> tuple[Transport, Transport]:
    reading, writing = os.pipe()
    return _fd(writing), _fd(reading)


def _socket_fds() -> tuple[Transport, Transport]:
    ours, theirs = socket.socketpair()
    return _fd(ours.detach()), _fd(theirs.detach())


def _exec(tmp_path: Path, **options: str) -> AbstractAsyncContextManager[Ends]:
    saving = transport_for(TransportURI("exec", f"cat > {tmp_path}/a.img", options))
    return transport_ends(transport_for(TransportURI("exec", f"cat {tmp_path}/a.img")), saving, stored=True)


def _maker(name: str, tmp_path: Path) -> Maker:
    match name:
        case "fd of a pipe":
            return _pipe_fds
        case "fd of a socket":
            return _socket_fds
        case "exec":
            return lambda: _exec(tmp_path)
        case uri:
            return lambda: _transport(TransportURI.parse(uri.replace("{tmp}", str(tmp_path))))


_LEAVING_FDS = [
    check
    for check in CHECKS
    if check.__name__ == "check_uris"
    or check.__module__.endswith((".listening", ".stored"))
    or check.__name__ == "check_listener_says_where"
]


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", checks_for(stores=False, two_way=True), ids=_name)
@pytest.mark.parametrize("name", STREAMS)
async def test_streams(name: str, check: Check, tmp_path: Path) -> None:
    await check(_maker(name, tmp_path))


# Without those that leave the descriptors of a test alone: nobody would close them.
@pytest.mark.parametrize("check", [check for check in CHECKS if check not in _LEAVING_FDS], ids=_name)
@pytest.mark.parametrize("name", FDS)
async def test_fds(name: str, check: Check, tmp_path: Path) -> None:
    await check(_maker(name, tmp_path))


@pytest.mark.parametrize("check", checks_for(stores=True), ids=_name)
@pytest.mark.parametrize("name", STORES)
async def test_stores(name: str, check: Check, tmp_path: Path) -> None:
    await check(_maker(name, tmp_path))


@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize("name", GUARDED)
async def test_through_the_guard(
    name: str, check: Check, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "strays", nursery, raising=False)
    await check(_maker(f"guarded+{name}", tmp_path))


# What a command leaves of its file when it is killed is its own affair.
_OF_A_COMMAND = [c for c in checks_for(stores=True) if not c.__module__.endswith(".stored")]


@pytest.mark.parametrize("check", _OF_A_COMMAND, ids=_name)
@pytest.mark.parametrize("options", [{}, {"live": "off"}], ids=str)
async def test_exec(options: dict[str, str], check: Check, tmp_path: Path) -> None:
    await check(lambda: _exec(tmp_path, **options))


# Without those that move megabytes.
@pytest.mark.parametrize("check", checks_for(stores=False, two_way=True)[2:8], ids=_name)
async def test_memory_that_holds_one_byte(check: Check) -> None:
    await check(lambda: MemoryTransport(TransportURI("memory", "a", {"capacity": "1"})))


@pytest.mark.parametrize("name", ["exec", *STREAMS, *FDS, *STORES])
@given(plan=plans())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(name: str, tmp_path: Path, plan: Plan) -> None:
    await check_plan(_maker(name, tmp_path), plan)


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
@pytest.mark.parametrize("scheme", ["pipe", "exec"])
async def test_a_process_that_takes_nothing(
    scheme: str, check: Check, tmp_path: Path, program: Callable[[str], str]
) -> None:
    sleeper = program("exec sleep 1000")
    options = {"helper": sleeper} if scheme == "pipe" else {}
    target = f"{tmp_path}/a.img" if scheme == "pipe" else sleeper
    await check(lambda: transport_for(TransportURI(scheme, target, options)))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=_name)
async def test_file_on_a_disk_that_hangs(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = threading.Event()

    def hang(fd: int, data: memoryview, offset: int) -> int:
        alive.wait()
        return len(data)

    monkeypatch.setattr(os, "pwrite", hang)
    try:
        await check(lambda: transport_for(TransportURI("file", f"{tmp_path}/a.img")))
    finally:
        alive.set()
