"""A nursery for the tasks of one's own context, whose block raises what it raises and no group around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def own_nursery() -> AsyncIterator[trio.Nursery]:
    """As ``trio.open_nursery``; but an exception that is the only one comes out as it is, not in a group.

    For contexts such as `Transport.connect`, where a `TransportError` of the block has to stay one.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        only = group.exceptions[0]
    else:
        return
    try:
        raise only
    finally:
        del only  # its traceback has this frame: no circle of the two
