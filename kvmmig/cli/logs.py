"""Where log records go: to the messages of the command that runs, and nowhere else.

A log is for whoever looks for a bug, a stranger's transport's most of all. What a person has to know is said
as a sentence besides.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmmig.errors import printable

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


def to_stderr(text: str) -> None:
    """For `logging_to`, where there is no `Output` yet."""
    print(printable(text, "\n\t"), file=sys.stderr, flush=True)


@contextmanager
def logging_to(say: Callable[[str], None] | None) -> Iterator[None]:
    """In this block ``say`` alone gets kvmmig's log records, from any thread; with None, nobody gets them.

    Each is text of one or more lines.
    """
    logger = logging.getLogger("kvmmig")
    former = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Handler(say) if say else logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = former
