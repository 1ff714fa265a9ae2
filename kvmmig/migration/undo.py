"""What is undone when a migration ends, whatever it ended with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import trio

_log = logging.getLogger(__name__)


class Undo:
    """At the end of the block, calls what was pushed, the last one first: all of them, even where one fails.

    To be pushed the moment that the thing is done, or is about to be. A cancel waits for it: be short.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        """``note`` is told a sentence when something can't be undone."""
        self._note = note
        self._stack = AsyncExitStack()

    def push(self, what: str, call: Callable[[], Awaitable[None]]) -> None:
        """``what`` completes "can't ...". ``call`` does no harm where there is nothing to undo."""

        async def undo() -> None:
            with trio.CancelScope(shield=True):
                try:
                    await call()
                except Exception as error:
                    _log.exception("can't %s", what)
                    self._note(f"can't {what}: {error}")

        self._stack.push_async_callback(undo)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()
