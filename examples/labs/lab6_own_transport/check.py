"""What is still wrong in lab 6, and why: kvmmig's own conformance suite says it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import trio

from kvmmig.errors import KvmmigError
from kvmmig.testing import Check, Nonconformance, checks_for
from kvmmig.transport import Transport, TransportURI

NEEDS_KVM = False

#: Sentences: the first ones mended, the others often go by themselves.
_MOST = 5
#: Seconds for one check: its own patience is 30, and a student has less.
_PATIENCE = 10.0


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as directory:
        wrong = (
            f"{each.__name__}: {sentence}"
            for number, each in enumerate(checks_for(stores=False, two_way=True))
            if (sentence := trio.run(_sentence, student, each, Path(directory) / str(number)))
        )
        yield from itertools.islice(wrong, _MOST)


async def _sentence(student: ModuleType, check: Check, path: Path) -> str:
    numbers = itertools.count()

    def make() -> Transport:
        transport: Transport = student.OwnTransport(TransportURI("own", f"{path}-{next(numbers)}"))
        return transport

    said = f"it had not come to its end after {_PATIENCE:g} s: some call never returns"
    try:
        with trio.move_on_after(_PATIENCE):
            await check(make)
            said = ""
    except* (Nonconformance, KvmmigError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        said = str(error)
    return said
