"""``--detach``: the machine lives in a process of its own; the command returns when it runs, or says why not.

The process is forked before anything with threads is imported. It reports to the command through a pipe, in
lines of JSON: the log that its messages go to, then that it runs, or the sentence that says why not.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress

from kvmmig.cli import rundir
from kvmmig.cli.printing import echo
from kvmmig.cli.statuses import FAILED, status_of
from kvmmig.errors import KvmmigError


class Background:
    """The machine's side: it says what the command that started it is waiting for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def log_to(self, claim: rundir.Claim) -> None:
        """From here on messages go to its new log, and nothing is read from the terminal."""
        log = claim.open_log()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(nothing)
        os.close(log)
        self._report({"log": claim.name})

    def runs(self, name: str, what: str) -> None:
        """The machine runs, or waits for its guest, as ``what`` says: the command may return. Idempotent."""
        self._report({"runs": name, "what": what})
        self._close()

    def failed(self, error: KvmmigError) -> bool:
        """It does not; False when it did and so the command is gone."""
        if self._fd < 0:
            return False
        self._report({"failed": str(error), "status": status_of(error)})
        self._close()
        return True

    def _report(self, what: dict[str, object]) -> None:
        if self._fd >= 0:
            with suppress(BrokenPipeError):
                os.write(self._fd, json.dumps(what).encode() + b"\n")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def perhaps_in_background(wanted: bool, life: Callable[[Background | None], int]) -> int:
    """Call ``life`` here, or as `in_background` does."""
    return in_background(life) if wanted else life(None)


def in_background(life: Callable[[Background], int]) -> int:
    """Fork; call ``life`` in the child, and wait in the parent until it runs. Returns each one's exit status.

    ``life`` must call `Background.log_to` and `Background.runs`. A `KvmmigError` before that is the parent's
    error; one after it is raised here, in the child, whose messages are in the log.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(write_end)
        with os.fdopen(read_end, encoding="utf-8") as reports:
            return _wait(pid, reports)
    os.close(read_end)
    os.setsid()
    background = Background(write_end)
    try:
        return life(background)
    except KvmmigError as error:
        if background.failed(error):
            return FAILED
        raise


def _wait(pid: int, reports: Iterable[str]) -> int:
    log: str | None = None
    status = FAILED
    try:
        for line in reports:
            match json.loads(line):
                case {"log": name}:
                    log = name
                case {"runs": name, "what": what}:
                    echo(name)
                    echo(_how_to_use(name, what), err=True)
                    return 0
                case {"failed": why, "status": status}:
                    echo(f"kvmmig: {why}", err=True)
                    break
        else:
            echo("kvmmig: the machine ended before it ran", err=True)
            echo(rundir.take_log(log) if log else "", err=True, nl=False)
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        for line in reports:  # what it has said meanwhile
            log = log or json.loads(line).get("log")
        if log is not None:
            rundir.take_log(log)
        return 130
    os.waitpid(pid, 0)
    if log is not None:
        rundir.take_log(log)
    return status


def _how_to_use(name: str, what: str) -> str:
    return f"kvmmig: {what}\nkvmmig: see it with kvmmig logs {name}, end it with kvmmig quit {name}"
