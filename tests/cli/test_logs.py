"""Log records: as a log, to whoever has asked for them, and to nobody else."""

from __future__ import annotations

import logging
import re

import pytest

from kvmmig.cli.logs import logging_to


def test_a_record_has_its_time_level_and_traceback_and_goes_nowhere_else(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("kvmmig.transport")
    outer: list[str] = []
    inner: list[str] = []
    with logging_to(outer.append):
        log.warning("first")
        with logging_to(inner.append):
            try:
                raise ZeroDivisionError("a slip")
            except ZeroDivisionError:
                log.exception("it failed")
        log.warning("last")
        with logging_to(None):
            log.error("of no interest")
    assert [text.split(": ")[-1] for text in outer] == ["first", "last"]
    (text,) = inner
    head, *rest = text.splitlines()
    assert re.fullmatch(r"[-\d]{10} [\d:]{8},\d{3} ERROR kvmmig\.transport: it failed", head)
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ZeroDivisionError: a slip"
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
