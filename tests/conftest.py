"""Tests marked ``kvm`` are skipped, with the reason, where KVM can't be used; the last lines count them."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvmmig.errors import KvmUnavailable
from kvmmig.kvm import System

# How long an example takes, or its making, says more of the machine than of the code.
# The slow tests ask for many more.
settings.register_profile(
    "kvmmig", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvmmig")

_outcomes = pytest.StashKey[Counter[str]]()
_RAN = "ran on /dev/kvm"
_NEEDS_KVM = "needs /dev/kvm"


def _why_not() -> str | None:
    try:
        with System.open() as system, system.create_vm():
            return None
    except KvmUnavailable as error:
        return str(error)


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job has it ignored, and so would every program that a test starts and interrupts.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    for name in ("COLUMNS", "LINES"):  # a terminal of a test's own has its own size
        os.environ.pop(name, None)
    config.stash[_outcomes] = Counter()
    config.pluginmanager.register(_Counting(config))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory like ``/tmp``: everybody may make files in it, and remove only their own."""
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as made:
        os.chmod(made, 0o1777)
        yield Path(made)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("kvm")]
    for item in marked:
        item.user_properties.append((_NEEDS_KVM, True))  # comes with its reports, from other processes too
    reason = _why_not() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


class _Counting:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (_NEEDS_KVM, True) not in report.user_properties:
            return
        if report.skipped and isinstance(report.longrepr, tuple):
            self._config.stash[_outcomes]["skipped: " + report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self._config.stash[_outcomes][_RAN] += 1


# Around everybody else's, so that the line comes after pytest's own last one.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        for outcome, count in session.config.stash[_outcomes].most_common():
            reporter.write_line(f"kvm: {count} test{'s' if count > 1 else ''} {outcome}")
    return result
