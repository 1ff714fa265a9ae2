"""Stores, commands and descriptors pass the suite that we ship: what connects is in test_conformance."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.testing import CLOGGED_CHECKS, Check, checks_for
from kvmmig.transport import TransportURI, transport_for
from tests.transports.makers import Guarded, exec_ends, maker_of, name_of

STORES = (
    "file:{tmp}/a.img",
    pytest.param("file:{tmp}/a.img?direct=off", marks=pytest.mark.slow),
    "pipe:{tmp}/a.img",
    pytest.param("pipe:{tmp}/a.img?direct=off", marks=pytest.mark.slow),
    pytest.param(
        "throttle+file:{tmp}/a.img?throttle.rate=500MB/s&throttle.latency=1ms", marks=pytest.mark.slow
    ),
    "fault+pipe:{tmp}/a.img?fault.what=stall&fault.at=1MiB&fault.for=20ms",
)
FDS = {"fd of a socket": True, "fd of a pipe": False}  # whether it is two-way

pytestmark = pytest.mark.usefixtures("everything_applies")


@pytest.mark.parametrize("check", checks_for(stores=True), ids=name_of)
@pytest.mark.parametrize("name", STORES)
async def test_stores(name: str, check: Check, tmp_path: Path) -> None:
    await check(maker_of(name, tmp_path))


@pytest.mark.parametrize("check", checks_for(stores=True), ids=name_of)
@pytest.mark.parametrize("name", ["file:{tmp}/a.img", "pipe:{tmp}/a.img"])
async def test_a_store_through_the_guard(
    name: str, check: Check, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "strays", nursery, raising=False)
    await check(maker_of(f"guarded+{name}", tmp_path))


# Without the one that leaves the descriptors of a test alone: nobody would close them.
_OF_FDS = [
    pytest.param(name, check, id=f"{name}-{name_of(check)}")
    for name, two_way in FDS.items()
    for check in checks_for(stores=False, two_way=two_way, arrives_at_once=True)
    if name_of(check) != "uris"
]


@pytest.mark.parametrize(("name", "check"), _OF_FDS)
async def test_fds(name: str, check: Check, tmp_path: Path) -> None:
    await check(maker_of(name, tmp_path))


# What a command leaves of its file when it is killed is its own affair; the ends of one are no transport.
_OF_A_COMMAND = [
    check
    for check in checks_for(stores=True)
    if not check.__module__.endswith(".stored") and name_of(check) != "uris"
]


@pytest.mark.parametrize("check", _OF_A_COMMAND, ids=name_of)
@pytest.mark.parametrize("options", [{}, {"live": "off"}], ids=str)
async def test_exec(options: dict[str, str], check: Check, tmp_path: Path) -> None:
    await check(lambda: exec_ends(tmp_path, **options))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=name_of)
@pytest.mark.parametrize("scheme", ["pipe", "exec"])
async def test_a_process_that_takes_nothing(
    scheme: str, check: Check, tmp_path: Path, program: Callable[[str], str]
) -> None:
    sleeper = program("exec sleep 1000")
    options = {"helper": sleeper} if scheme == "pipe" else {"live": "off"}
    target = f"{tmp_path}/a.img" if scheme == "pipe" else sleeper
    await check(lambda: transport_for(TransportURI(scheme, target, options)))


@pytest.mark.parametrize("check", CLOGGED_CHECKS, ids=name_of)
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
