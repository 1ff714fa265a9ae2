"""Waiting for what nobody announces."""

from __future__ import annotations

from collections.abc import Callable

import trio

#: Seconds after which something hangs.
PATIENCE = 15.0


async def until(done: Callable[[], bool], *, every: float = 0.0005) -> bool:
    """Ask again and again; False if ``done`` was not so within `PATIENCE`."""
    with trio.move_on_after(PATIENCE):
        while not done():  # noqa: ASYNC110  # figures, /proc and guest memory have no events to wait for
            await trio.sleep(every)
        return True
    return False
