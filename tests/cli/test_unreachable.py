"""A machine whose process does not do its part is seen as such by every command, and can be ended."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmmig.cli import remote, rundir
from kvmmig.cli.holder import holder

from .conftest import Kvmmig

pytestmark = pytest.mark.kvm

SMALL = ("dirtier", "--memory", "16MiB", "--set", "hot=1MiB", "--name", "a")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]

# A transport that does to the event loop what nothing should, when a guest is to go there.
BREAKER = """
import gc, os, select, sys, time
from contextlib import asynccontextmanager
from kvmmig.cli import forced_exit, loop_watch, main
from kvmmig.transport import Transport, register

loop_watch.NOTICE, loop_watch.BOUND = 0.5, {bound}
forced_exit.BOUND = 1.0

class Breaker(Transport):
    @asynccontextmanager
    async def connect(self):
        {act}
        raise AssertionError("unreachable")
        yield

    @asynccontextmanager
    async def listen(self):
        raise AssertionError("unreachable")
        yield

register("breaker", Breaker)
sys.exit(main())
"""
STUCK = "time.sleep(1000)"
CLOSED = (
    "[os.close(int(n)) for n in os.listdir('/proc/self/fd')"
    " if os.path.lexists('/proc/self/fd/' + n) and 'eventpoll' in os.readlink('/proc/self/fd/' + n)];"
    " import trio; await trio.sleep(0)"
)


def break_loop(kvmmig: Kvmmig, *, act: str, bound: float) -> Path:
    return Path(kvmmig.program("breaker.py", BREAKER.format(act=act, bound=bound)))


def begin(command: Command) -> None:
    command("migrate", "a", "breaker:x", "--detach")


def test_one_that_stands_still_is_seen_by_all_and_ended(
    background: Background, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TERM_TIME", 0.5)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    background("run", *SMALL)
    pid = json.loads(command("status", "a", "--json")[1])["pid"]
    assert holder("a") == pid
    os.kill(pid, signal.SIGSTOP)
    (row,) = json.loads(command("ls", "--json")[1])
    assert (row["name"], row["status"], row["pid"]) == ("a", "does not answer", pid)
    assert str(pid) in command("ls")[1]
    for line in (["status", "a"], ["pause", "a"], ["migrate", "a", "tcp:127.0.0.1:1"]):
        status, _, error = command(*line)
        assert status == 1
        assert f"the machine 'a' (process {pid}) does not answer" in error
        assert "kvmmig quit a ends it" in error
    status, _, error = command("quit", "a")
    assert status == 0
    assert f"SIGTERM to its process {pid} has not ended it" in error
    assert f"SIGKILL has ended its process {pid}" in error
    assert json.loads(command("ls", "--json")[1]) == []
    assert rundir.names() == []


@pytest.mark.parametrize(("act", "sentence"), [(STUCK, "has not turned"), (CLOSED, "is broken")])
def test_one_whose_loop_does_not_turn_does_not_live_on(
    kvmmig: Kvmmig, command: Command, act: str, sentence: str
) -> None:
    machine = kvmmig.start("run", *SMALL, wrapper=break_loop(kvmmig, act=act, bound=2.0))
    machine.wait_for(lambda it: "A" in it.stdout and bool(rundir.names()))
    begin(command)
    assert machine.end(logs=True) == 1
    assert sentence in machine.stderr
    assert rundir.names() == []


def test_sigterm_ends_one_whose_loop_is_stuck(kvmmig: Kvmmig, command: Command) -> None:
    machine = kvmmig.start("run", *SMALL, wrapper=break_loop(kvmmig, act=STUCK, bound=1000.0))
    machine.wait_for(lambda it: "A" in it.stdout and bool(rundir.names()))
    begin(command)
    machine.wait_for(lambda it: "the event loop has not turned" in it.stderr)
    machine.process.terminate()
    assert machine.end(logs=True) == 143


def test_one_that_stood_still_for_long_is_not_ended_for_it(kvmmig: Kvmmig, command: Command) -> None:
    machine = kvmmig.start("run", *SMALL, wrapper=break_loop(kvmmig, act=STUCK, bound=1.5))
    machine.wait_for(lambda it: "A" in it.stdout and bool(rundir.names()))
    machine.process.send_signal(signal.SIGSTOP)
    time.sleep(4.0)  # what is tested is that this time does not count
    machine.process.send_signal(signal.SIGCONT)
    assert json.loads(command("status", "a", "--json")[1])["status"] == "running"
    assert "has not turned" not in machine.stderr
    machine.interrupt()
    assert machine.end() == 130
