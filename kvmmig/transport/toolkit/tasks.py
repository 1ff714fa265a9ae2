"""A channel's own tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def own_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery for the tasks of a channel, which are cancelled at the end of the block.

    What the block raises comes out as it is, and not in a group. The tasks should raise nothing: a task that
    does ends the block, and leaves it in a group as from any nursery.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
