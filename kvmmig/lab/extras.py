"""What only some need to have installed, and the sentence for those who have not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvmmig.errors import KvmmigError


class ExtraMissing(KvmmigError):
    """A package is missing that only this part needs."""


@contextmanager
def needed_for(what: str, extra: str = "lab") -> Iterator[None]:
    """Imports of extras stand in this block. Raises `ExtraMissing`, which says how to get that ``extra``."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"{what} needs {error.name}, which is not installed: pip install 'kvmmig[{extra}]'"
        ) from error
