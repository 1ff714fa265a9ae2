"""Processes beside this one, which end with the block that they were started for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio


async def start_module(
    nursery: trio.Nursery,
    module: str,
    *arguments: str,
    input: bytes | None = None,
    keep_errors: bool = False,
) -> trio.Process:
    """Start ``python -m MODULE`` in ``nursery``, whose cancel kills it.

    Its output is a pipe, and so is its input, which gets ``input`` and its end where that is given. With
    ``keep_errors`` its errors are a pipe too; else they are this process's.
    """
    run = partial(
        trio.run_process,
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE if input is None else input,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if keep_errors else None,
        check=False,
        deliver_cancel=_kill,
    )
    process: trio.Process = await nursery.start(run)
    return process


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but use a CPU, as long as the block lasts."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


async def _kill(process: trio.Process) -> None:
    process.kill()
