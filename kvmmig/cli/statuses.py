"""Exit statuses of errors: 2 for a command line that makes no sense, 1 for all else that went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvmmig.errors import BadConfig, BadImage, BadURI, KvmmigError

FAILED, WRONG_COMMAND_LINE = 1, 2


class WrongCommandLine(KvmmigError):
    """What was typed can't be meant so. The text says what would be right."""


@contextmanager
def command_line() -> Iterator[None]:
    """In this block, what can't be built is what was typed: `BadConfig`, `BadImage` -> `WrongCommandLine`."""
    try:
        yield
    except (BadConfig, BadImage) as error:
        raise WrongCommandLine(str(error)) from error


def status_of(error: KvmmigError) -> int:
    """What a command exits with that has failed so. A URI is always one that was typed."""
    return WRONG_COMMAND_LINE if isinstance(error, WrongCommandLine | BadURI) else FAILED
