"""Every transport that connects passes the suite that we ship, as it is and through the guard."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kvmmig.testing import Check, MemoryTransport, checks_for
from kvmmig.transport import TransportURI
from tests.transports.makers import Guarded, maker_of, name_of

# The source goes where the listener says that it is, in the same wrappers.
STREAMS = (
    "memory:a",
    "greeting+memory:a",
    "tcp:127.0.0.1:0",
    "tcp:127.0.0.1:0?lanes=3",
    "unix:{tmp}/a.sock",
    "throttle+unix:{tmp}/a.sock?throttle.rate=300MB/s&throttle.latency=2ms&throttle.jitter=2ms",
)
# Only one part of each channel differs from those above, or from a channel in a wrapper.
IN_PARTS = (
    "tcp:[::1]:0",
    "unix:{tmp}/a.sock?lanes=2",
    "throttle+tcp:127.0.0.1:0?throttle.rate=300MB/s",
    "fault+tcp:127.0.0.1:0",
    "fault+tcp:127.0.0.1:0?fault.what=short&fault.at=5MiB&fault.for=20ms",
    "fault+unix:{tmp}/a.sock?fault.what=stall&fault.at=3&fault.for=20ms",
    "fault+throttle+tcp:127.0.0.1:0?fault.what=trickle&fault.side=receive&fault.seed=1&fault.for=20ms",
)
PARTS = tuple(
    check
    for check in checks_for(stores=False, two_way=True)
    if check.__module__.endswith((".delivery", ".ending", ".loop"))
    or name_of(check) in ("both_ways_at_once", "second_accept", "knobs")
)

pytestmark = pytest.mark.usefixtures("everything_applies")


def _checks(name: str, *, two_way: bool = True) -> list[object]:
    checks = checks_for(stores=False, two_way=two_way, has_socket="memory" not in name)
    return [pytest.param(name, check, id=f"{name}-{name_of(check)}") for check in checks]


@pytest.mark.parametrize(("name", "check"), [case for name in STREAMS for case in _checks(name)])
async def test_streams(name: str, check: Check, tmp_path: Path) -> None:
    await check(maker_of(name, tmp_path))


@pytest.mark.parametrize("check", PARTS, ids=name_of)
@pytest.mark.parametrize("name", IN_PARTS)
async def test_what_wrappers_change(name: str, check: Check, tmp_path: Path) -> None:
    await check(maker_of(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        *_checks("memory:a"),
        *_checks("tcp:127.0.0.1:0", two_way=False),
        *_checks("unix:{tmp}/a.sock", two_way=False),
    ],
)
async def test_through_the_guard(
    name: str, check: Check, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "strays", nursery, raising=False)
    await check(maker_of(f"guarded+{name}", tmp_path))


# Without those that move megabytes.
@pytest.mark.parametrize("check", checks_for(stores=False, two_way=True)[2:8], ids=name_of)
async def test_memory_that_holds_one_byte(check: Check) -> None:
    await check(lambda: MemoryTransport(TransportURI("memory", "a", {"capacity": "1"})))
