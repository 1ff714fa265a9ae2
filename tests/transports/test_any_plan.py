"""Whatever is cancelled, and when: what arrives is what was accepted. Hypothesis thinks up the moments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kvmmig.testing import Plan, check_plan, plans
from tests.transports.makers import maker_of

NAMES = (
    "memory:a",
    pytest.param("greeting+memory:a", marks=pytest.mark.slow),
    "tcp:127.0.0.1:0",
    "tcp:127.0.0.1:0?lanes=3",
    "unix:{tmp}/a.sock",
    "fd of a socket",
    "fd of a pipe",
    "exec",
    "file:{tmp}/a.img",
    "pipe:{tmp}/a.img",
    "throttle+tcp:127.0.0.1:0?throttle.rate=300MB/s&throttle.latency=1ms",
    pytest.param(
        "throttle+file:{tmp}/a.img?throttle.rate=500MB/s&throttle.latency=1ms", marks=pytest.mark.slow
    ),
    pytest.param(
        "fault+tcp:127.0.0.1:0?fault.what=short&fault.at=5MiB&fault.for=20ms", marks=pytest.mark.slow
    ),
    pytest.param(
        "fault+unix:{tmp}/a.sock?fault.what=stall&fault.at=3&fault.for=20ms", marks=pytest.mark.slow
    ),
    "fault+throttle+tcp:127.0.0.1:0?fault.what=trickle&fault.side=receive&fault.seed=1&fault.for=20ms",
)


@pytest.mark.parametrize("name", NAMES)
@given(plan=plans())
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(name: str, tmp_path: Path, plan: Plan) -> None:
    await check_plan(maker_of(name, tmp_path), plan)
