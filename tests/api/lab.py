"""A guest that writes all the while, opened as a Python user does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import kvmmig

PATIENCE = 60.0  # seconds for anything; a test that needs nearly so many has failed
SINK = "exec:cat > /dev/null"


def state_of(machine: kvmmig.Machine) -> kvmmig.State:
    return machine.state  # by a call, so that type checkers don't think that it can't have changed


@asynccontextmanager
async def dirtier() -> AsyncIterator[kvmmig.Machine]:
    """Loaded, to be started."""
    with trio.fail_after(PATIENCE):
        async with kvmmig.open_machine("dirtier", memory="16MiB", settings={"hot": "1MiB"}) as machine:
            yield machine


@asynccontextmanager
async def running_dirtier() -> AsyncIterator[kvmmig.Machine]:
    """It runs, and all of its memory is written."""
    letters = bytearray()
    with trio.fail_after(PATIENCE):
        async with kvmmig.open_machine(
            "dirtier", memory="16MiB", settings={"hot": "1MiB"}, output=letters.extend
        ) as machine:
            await machine.start()
            while not letters:  # noqa: ASYNC110 -- the guest has no event for it
                await trio.sleep(0.001)
            yield machine
