"""A log in which strangers can't write as much as they like."""

from __future__ import annotations

import logging

import trio

_MOST_LINES = 10
_PERIOD = 60.0  # seconds


class BoundedLog:
    """So many warnings a minute: whoever connects again and again must not fill a disk.

    One belongs to one listener: another's strangers are not to silence it, and its clock is its event loop's.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._since = 0.0
        self._lines = 0

    def warn(self, text: str) -> None:
        """Log it, or count it where there were too many; the next minute says how many were left out."""
        now = trio.current_time()
        if not self._lines or now - self._since >= _PERIOD:
            if self._lines > _MOST_LINES:
                self._log.warning("%d more lines about clients were left out", self._lines - _MOST_LINES)
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines <= _MOST_LINES:
            self._log.warning("%s", text)
