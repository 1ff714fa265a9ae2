"""``heartbeat`` tells how long it stood still."""

from __future__ import annotations

import re
from time import perf_counter

import pytest
import trio

from .conftest import Move, Run

pytestmark = pytest.mark.kvm

PAUSE = 0.4


def blackouts(text: str) -> list[float]:
    """In seconds."""
    return [float(found) / 1000 for found in re.findall(r"blackout (\d+\.\d) ms", text)]


async def test_it_tells_of_a_pause_and_of_a_move_as_long_as_they_were(run: Run, move: Move) -> None:
    async with run("heartbeat", threshold=int(PAUSE * 500)) as running:
        await running.screen.until(lambda text: "." in text)
        began = perf_counter()
        await running.machine.pause()
        with trio.CancelScope(deadline=trio.current_time() + PAUSE):
            await trio.sleep_forever()
        await running.machine.resume()
        took = perf_counter() - began
        text = await running.screen.until(blackouts)
        assert PAUSE - 0.01 <= blackouts(text)[0] <= took + 0.2  # and what its host held it up

        began = perf_counter()
        await running.machine.pause()
        with trio.CancelScope(deadline=trio.current_time() + PAUSE):
            await trio.sleep_forever()
        async with move(running) as moved:
            took = perf_counter() - began
            text = await moved.screen.until(blackouts)
            assert PAUSE - 0.01 <= blackouts(text)[0] <= took + 0.2
