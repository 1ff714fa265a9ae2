"""On a real terminal: what becomes of its modes, and what a person sees."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

PATIENCE = 60.0
SMALL = ("--memory", "32MiB", "--set", "hot=2MiB")


class Terminal:
    """A pseudo-terminal of 24 rows and 100 columns, with a command in its foreground."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.modes_before = self.modes()
        self._shown = bytearray()
        self.process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self._shown += os.read(self.master, 65536)
            except OSError:
                return

    def run(self, *arguments: str) -> None:
        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmmig", "run", *arguments],
            cwd=self._directory,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=take_terminal,
        )

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def modes(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    def echoes(self) -> bool:
        flags = self.modes()[3]
        assert isinstance(flags, int)
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not seen():
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)

    def end(self) -> int:
        assert self.process is not None
        status = self.process.wait(PATIENCE)
        assert self.modes() == self.modes_before
        assert "Traceback" not in self.shown
        return status

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.close()


def test_keys_reach_the_guest_unechoed_and_unbuffered(terminal: Terminal) -> None:
    terminal.run("echo")
    terminal.wait_for(lambda: "Ctrl-D" in terminal.shown)
    assert not terminal.echoes()
    terminal.type(b"x")  # no Return: the guest itself echoes it, once
    terminal.wait_for(lambda: terminal.shown.endswith("x"))
    terminal.type(b"\r")
    terminal.wait_for(lambda: terminal.shown.endswith("x\r\r\n"))
    terminal.type(b"\x04")
    assert terminal.end() == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_restores_the_modes(terminal: Terminal, number: int, status: int) -> None:
    terminal.run("echo")
    terminal.wait_for(lambda: "Ctrl-D" in terminal.shown)
    assert terminal.process is not None
    terminal.process.send_signal(number)
    assert terminal.end() == status


def test_ctrl_c_restores_the_modes(terminal: Terminal) -> None:
    terminal.run("dirtier", *SMALL)
    terminal.wait_for(lambda: "A" in terminal.shown)
    terminal.type(b"\x03")
    assert terminal.end() == 130


def test_an_error_restores_the_modes(terminal: Terminal) -> None:
    terminal.run("--incoming", "file:absent.img")
    assert terminal.end() == 1
    assert "kvmmig: " in terminal.shown


def test_ctrl_c_works_while_the_terminal_is_stopped(terminal: Terminal) -> None:
    terminal.run("dirtier", *SMALL)
    terminal.wait_for(lambda: "A" in terminal.shown)
    termios.tcflow(terminal.slave, termios.TCOOFF)  # as Ctrl-S does
    assert terminal.process is not None
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(PATIENCE) == 130
    termios.tcflow(terminal.slave, termios.TCOON)
    assert terminal.end() == 130


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(terminal: Terminal) -> None:
    terminal.run("echo")
    terminal.wait_for(lambda: "Ctrl-D" in terminal.shown)
    assert terminal.process is not None
    terminal.type(b"\x1a")
    pid, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert (pid, os.WIFSTOPPED(status)) == (terminal.process.pid, True)
    assert terminal.modes() == terminal.modes_before
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for(lambda: not terminal.echoes())
    terminal.type(b"still here")
    terminal.wait_for(lambda: terminal.shown.endswith("still here"))
    terminal.type(b"\x03")
    assert terminal.end() == 130


def test_a_move_shows_one_live_line_and_then_its_figures(terminal: Terminal, tmp_path: Path) -> None:
    terminal.run("dirtier", "--memory", "256MiB", "--migrate-to", f"file:{tmp_path}/a.img", "--after", "0.1")
    assert terminal.end() == 0
    assert "| left " in terminal.shown
    assert "round 0:" not in terminal.shown  # those lines are for logs
    figures = terminal.shown[terminal.shown.index("kvmmig: the guest has moved to") :]
    assert "\x1b" not in figures  # the live line is gone
    assert "downtime" in figures
    # However long the status, it stays in its row: 100 columns are there.
    rows = [part.split("\x1b8")[0] for part in terminal.shown.split("\x1b[2K")[1:]]
    assert max(map(len, rows)) < 100


def test_another_terminal_may_be_the_serial_port(terminal: Terminal, tmp_path: Path) -> None:
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    try:
        terminal.run("echo", "--serial", os.ttyname(slave))
        shown = b""
        while b"Ctrl-D" not in shown:
            shown += os.read(master, 1000)
        os.write(master, b"y\x04")
        assert terminal.end() == 0
        assert os.read(master, 1000).endswith(b"y")
        assert termios.tcgetattr(slave) == before
        assert "Ctrl-D" not in terminal.shown
    finally:
        os.close(slave)
        os.close(master)


def test_in_the_background_the_terminal_is_left_alone(terminal: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "shell.py"
    # A shell with job control, in short: its job gets a process group that is not the foreground's.
    script.write_text(
        "import os, signal, subprocess, sys\n"
        "job = subprocess.Popen([sys.executable, '-m', 'kvmmig', 'run', 'hello'], process_group=0)\n"
        "pid, status = os.waitpid(job.pid, os.WUNTRACED)\n"
        "if os.WIFSTOPPED(status): job.kill()\n"
        "print('exited' if os.WIFEXITED(status) else 'stopped', os.waitstatus_to_exitcode(status))\n"
    )
    terminal.process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    terminal.end()
    terminal.wait_for(lambda: "exited 0" in terminal.shown or "stopped" in terminal.shown)
    assert "Hello" in terminal.shown
    assert "exited 0" in terminal.shown
