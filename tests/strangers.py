"""A second, unprivileged user of the host, played by a child process. Only root can do that."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

NOBODY = 65534

needs_second_user = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@contextmanager
def as_nobody(act: Callable[[], object]) -> Iterator[None]:
    """A process of that user has called ``act``, and keeps what it returned for the block."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(done[1])
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            kept = act()
            os.write(ready[1], b"y")
            os.read(done[0], 1)
            del kept
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(ready[1])
    os.close(done[0])
    try:
        assert os.read(ready[0], 1) == b"y", "what the other user was to do has failed"
        yield
    finally:
        os.close(done[1])
        os.close(ready[0])
        assert os.waitpid(child, 0)[1] == 0
