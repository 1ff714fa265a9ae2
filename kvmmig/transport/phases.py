"""A subscription to a migration's phases, for tools that do something at a certain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_Listener = Callable[[str], None]
_feed: ContextVar[list[_Listener] | None] = ContextVar("phases of the migration that connects", default=None)


def on_phase(listener: _Listener) -> None:
    """Have ``listener`` called with the name of each phase that the migration enters from now on.

    For a transport or a wrapper while it connects; at any other time, and on the destination, nobody ever
    calls. The names are those of `kvmmig.Phase`: ``setup``, ``rounds``, ``stop``, ``final``, ``commit``.
    Called on the event loop: be quick.
    """
    listeners = _feed.get()
    if listeners is not None:
        listeners.append(listener)


@contextmanager
def collecting(listeners: list[_Listener]) -> Iterator[None]:
    """For the engine: `on_phase` in this block, and in tasks that it starts, adds to ``listeners``."""
    token = _feed.set(listeners)
    try:
        yield
    finally:
        _feed.reset(token)
