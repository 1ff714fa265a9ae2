"""An I/O helper: a program that copies between a pipe and a file that it inherits, already open."""

from __future__ import annotations

import shutil
import sys

from kvmmig.errors import ConnectFailed
from kvmmig_transports import iohelper
from kvmmig.transport.toolkit.process import Process
from kvmmig.transport.toolkit.words import why


def start_helper(helper: str, path: str, fd: int, *, writes_file: bool) -> Process:
    """Start ``helper``, ours where it is empty. Blocks for a moment; raises `ConnectFailed`."""
    command = [*_find_program(helper), path, str(fd)]
    try:
        return Process(command, f"the I/O helper of {path}", fed=writes_file, fds=(fd,))
    except OSError as error:
        raise ConnectFailed(f"can't start the I/O helper {command[0]}: {why(error)}") from error


def _find_program(helper: str) -> list[str]:
    if not helper:
        return [sys.executable, "-I", "-S", iohelper.__file__]
    program = shutil.which(helper)
    if program is None:
        where = "there is no such program" if "/" in helper else "no directory of PATH has such a program"
        raise ConnectFailed(f"can't start the I/O helper {helper}: {where}")
    return [program]
