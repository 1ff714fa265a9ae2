"""Where log records go: to the messages of the command that runs, and nowhere else.

A log is for whoever looks for a bug, a stranger's transport's most of all. What a person has to know is said
as a sentence besides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT))
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._say(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def logging_to(say: Callable[[str], None]) -> Iterator[None]:
    """In this block ``say`` gets kvmmig's log records, each as text of one or more lines, from any thread."""
    logger, handler = logging.getLogger("kvmmig"), _Handler(say)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
