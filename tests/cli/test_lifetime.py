from __future__ import annotations

import os
import signal

import pytest
import trio

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
