"""Where ``--serial`` leads: the terminal that this runs on, a file, a named pipe, another terminal."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.cli.output import Output
from kvmmig.cli.terminal import Keyboard
from kvmmig.errors import MachineError
from kvmmig.transport.toolkit import why
from kvmmig.transport.toolkit.paths import UnsafePath, open_to_append


@dataclass(frozen=True, slots=True)
class SerialPort:
    """Both directions of the cable; ``keyboard`` is None where nothing can be typed."""

    output: Output
    keyboard: Keyboard | None


@asynccontextmanager
async def open_serial(
    path: str, *, forced_exit: ForcedExit, alone: bool = False
) -> AsyncIterator[SerialPort]:
    """``-`` is standard output and input; of a process that is ``alone`` (detached) nobody types there.

    Raises `MachineError` for a path that can't be opened or written.

    The terminal's modes are the guest's inside the block, and restored whatever happens, before a forced exit
    too.
    """
    output, keyboard = await _ends(path)
    if alone and path == "-":
        keyboard = None
    async with output:
        with ExitStack() as stack:
            if keyboard:
                stack.enter_context(keyboard.modes())
                stack.enter_context(forced_exit.before(keyboard.restore))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(output.watch)
                if keyboard:
                    nursery.start_soon(keyboard.obey_job_control)
                yield SerialPort(output, keyboard)
                nursery.cancel_scope.cancel()


async def _ends(path: str) -> tuple[Output, Keyboard | None]:
    if path == "-":
        return Output(), Keyboard(0)
    try:
        fd = await trio.to_thread.run_sync(_open, path)
    except (OSError, UnsafePath) as error:
        raise MachineError(
            f"--serial {path}: it can't be opened for writing: {why(error)}; name a file, a named pipe "
            "or a terminal"
        ) from error
    # Never closed: the thread that writes may be held in it for ever, and the command's end is the process's.
    return Output(serial=fd, serial_name=path), Keyboard(fd) if os.isatty(fd) else None


def _open(path: str) -> int:
    # A named pipe that is open both ways neither waits for a reader nor breaks when one goes.
    return open_to_append(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
