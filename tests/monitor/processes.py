"""Machines in processes of their own, as anybody starts them, with a monitor for anybody's client."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE = 60.0  # seconds


class MachineProcess:
    """``kvmmig run ARGUMENTS --qmp unix:...`` in ``directory``, until the end of the block."""

    def __init__(self, directory: Path, name: str, *arguments: str) -> None:
        self.socket = str(directory / f"{name}.qmp")
        self._log = directory / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "kvmmig", "run", *arguments),
                    *("--name", name, "--qmp", f"unix:{self.socket}", "--serial", os.devnull),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        """All that it has printed."""
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Until it has ended; its exit status."""
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(self.socket):
            assert self._process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        if kind is None:
            assert "Traceback" not in self.said, self.said


@contextmanager
def dirtier(directory: Path, *, memory: str = "64MiB", hot: str = "8MiB") -> Iterator[MachineProcess]:
    """A machine whose guest writes all the while."""
    with MachineProcess(directory, "a", "dirtier", "--memory", memory, "--set", f"hot={hot}") as machine:
        yield machine


@contextmanager
def awaiting(directory: Path, uri: str = "tcp:127.0.0.1:0") -> Iterator[MachineProcess]:
    """A machine whose guest is to come from there."""
    with MachineProcess(directory, "b", "--incoming", uri) as machine:
        yield machine
