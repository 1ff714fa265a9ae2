"""``tls+`` and ``secret+`` pass the suite: alone, in each other, and between other wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kvmmig.testing import Check, Plan, check_plan, checks_for, plans
from kvmmig.transport import Transport, TransportURI, transport_for
from tests.transports import certificates

URIS = (
    "tls+tcp:127.0.0.1:0?tls.dir={tmp}",
    pytest.param("tls+unix:{tmp}/a.sock?tls.dir={tmp}&tls.host=kvmmig.example", marks=pytest.mark.slow),
    pytest.param("secret+tcp:127.0.0.1:0?secret.key.file={tmp}/secret", marks=pytest.mark.slow),
    "secret+tls+tcp:127.0.0.1:0?secret.key.file={tmp}/secret&tls.dir={tmp}",
    pytest.param("throttle+tls+tcp:127.0.0.1:0?throttle.rate=300MB/s&tls.dir={tmp}", marks=pytest.mark.slow),
    pytest.param(
        "tls+fault+tcp:127.0.0.1:0?tls.dir={tmp}&fault.what=short&fault.at=5MiB&fault.for=20ms",
        marks=pytest.mark.slow,
    ),
)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = certificates.make(tmp_path_factory.mktemp("pki"))
    (made / "secret").write_text("a secret of both sides\n")
    (made / "secret").chmod(0o600)
    return made


def _transport(uri: str, where: Path) -> Transport:
    return transport_for(TransportURI.parse(uri.replace("{tmp}", str(where))))


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", checks_for(stores=False, two_way=True), ids=_name)
@pytest.mark.parametrize("uri", URIS)
async def test_streams(uri: str, check: Check, where: Path) -> None:
    await check(lambda: _transport(uri, where))


@pytest.mark.parametrize("uri", URIS)
@given(plan=plans())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(uri: str, where: Path, plan: Plan) -> None:
    await check_plan(lambda: _transport(uri, where), plan)
