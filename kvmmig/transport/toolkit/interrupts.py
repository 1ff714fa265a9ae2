"""Waits that end at once when something else has happened, such as an abort."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Interrupts:
    """``with interrupts.allowed(): await ...`` is left early by `now`; look there what has happened."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def now(self) -> None:
        """Interrupt all that wait at this moment."""
        for scope in self._scopes:
            scope.cancel()
