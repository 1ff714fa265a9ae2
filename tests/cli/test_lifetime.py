from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import trio

from kvmmig.cli import forced_exit
from kvmmig.cli.lifetime import run_to_end, the_error
from kvmmig.errors import BadImage, ChannelBroken


def test_the_status_is_the_commands() -> None:
    async def command() -> int:
        return 7

    assert run_to_end(command) == 7


def test_an_error_comes_out_of_its_groups_alone() -> None:
    async def fail() -> None:
        raise BadImage("it is bad")

    async def command() -> int:
        async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
            nursery.start_soon(trio.sleep_forever)
            inner.start_soon(fail)
        return 0

    with pytest.raises(BadImage, match="it is bad"):
        run_to_end(command)


def test_a_bug_stays_in_sight_beside_a_sentence() -> None:
    group = BaseExceptionGroup("", [BadImage("it is bad"), ValueError("a bug")])
    assert the_error(group) is group
    assert isinstance(the_error(BaseExceptionGroup("", [group, KeyboardInterrupt()])), KeyboardInterrupt)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_and_counts_more_than_what_that_broke(number: int) -> None:
    tidied = []

    async def command() -> int:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            tidied.append(True)
            raise ChannelBroken("cut short")

    assert run_to_end(command) == 128 + number
    assert tidied


STUBBORN = """
import os, signal, sys
import trio
from kvmmig.cli import forced_exit
from kvmmig.cli import forced_exit
from kvmmig.cli.lifetime import run_to_end
forced_exit.BOUND = 0.1
forced = forced_exit.ForcedExit()

async def command():
    with forced.before(lambda: print("released")):
        if sys.argv[1] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            forced.begin(7, "it has failed")
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()

run_to_end(command, forced_exit=forced)
"""


@pytest.mark.parametrize(
    ("cause", "status", "first"), [("signal", 143, ""), ("end", 7, "kvmmig: it has failed\n")]
)
def test_a_command_that_does_not_end_when_it_is_to_is_left(cause: str, status: int, first: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", STUBBORN, cause], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout) == (status, "released\n")
    assert ran.stderr.startswith(first + "kvmmig: something does not end")
    assert ran.stderr.endswith("after 0.1 s this process ends without it\n")


def test_one_that_ends_in_time_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forced_exit, "BOUND", 60.0)
    watching: list[threading.Thread] = []

    async def command() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await trio.sleep_forever()
        finally:
            watching.extend(each for each in threading.enumerate() if each.name == "kvmmig forced exit")

    assert run_to_end(command) == 128 + signal.SIGTERM
    (watch,) = watching
    watch.join(30)
    assert not watch.is_alive()
