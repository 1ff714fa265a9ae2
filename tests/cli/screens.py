"""A terminal as a person sees it: a command in its foreground, and a screen of rows that can be resized."""

from __future__ import annotations

import fcntl
import itertools
import os
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyte

PATIENCE = 60.0


class Screen:
    """A pseudo-terminal with an emulator behind it; 80 columns and 24 rows at first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.master, self.slave = os.openpty()
        self._set_size(80, 24)
        self._modes = termios.tcgetattr(self.slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.process: subprocess.Popen[bytes] | None = None

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            with self._lock:
                self._stream.feed(data)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """As a person does it with the mouse; what does not fit any more is cut off."""
        with self._lock:
            self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def run(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmmig", *arguments],
            cwd=self._directory,
            env={**os.environ, "TERM": "xterm-256color"},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def rows(self) -> list[str]:
        """What stands there now, row by row, without the empty ones."""
        with self._lock:
            return [row.rstrip() for row in self._screen.display if row.strip()]

    def cells(self) -> list[list[tuple[str, str, bool]]]:
        """The same rows as pieces of one look each: letters, their colour as pyte calls it, are they bold."""
        with self._lock:
            rows = []
            for y, shown in enumerate(self._screen.display):
                line = [self._screen.buffer[y][x] for x in range(len(shown.rstrip()))]
                looks = itertools.groupby(line, lambda cell: (cell.fg, cell.bold))
                rows.append([("".join(c.data for c in cells), fg, bold) for (fg, bold), cells in looks])
            return [row for row in rows if row]

    def text(self) -> str:
        return "\n".join(self.rows())

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, what: str | Callable[[str], bool]) -> str:
        """Until a text, or what a function looks for, stands on the screen; returns all of it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            text = self.text()
            if what in text if isinstance(what, str) else what(text):
                return text
            assert time.monotonic() < deadline, text
            time.sleep(0.01)

    def end(self) -> int:
        """The command's exit status; the terminal is as it was before."""
        assert self.process is not None
        status = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self._modes
        os.write(self.slave, b"\x1b]2;over\x07")  # a title, which comes behind all that the command wrote
        self.wait_for(lambda _: self._screen.title == "over")
        assert "Traceback" not in self.text()
        return status

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self.slave)
        os.close(self.master)
        self._reader.join(PATIENCE)
