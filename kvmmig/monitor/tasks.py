"""Tasks that go on until a block of code has come to its end, whatever that is cancelled by."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kvmmig.transport.toolkit import own_tasks


@asynccontextmanager
async def outliving() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks outlive the block: only when that has been left they are cancelled.

    A cancel from outside reaches the block first, and its clean-up can still use what these tasks hold.
    """
    async with own_tasks() as host:
        nursery: trio.Nursery = await host.start(_shielded)
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


async def _shielded(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.shield = True
        task_status.started(nursery)
        await trio.sleep_forever()
