"""A nursery for the tasks that serve a block of code, and end with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled at the end of the block.

    The block's own error comes out as it is, with its cause, and not within a nursery's group.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        (error,) = group.exceptions
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # `raise` has put the group there
            del error, context
