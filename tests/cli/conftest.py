"""Commands as a person runs them: in processes of their own, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from kvmmig.cli import main, rundir
from kvmmig.cli.holder import send_signal
from kvmmig.transport import descriptors
from tests.assembling import need_nasm

from .screens import Screen

PATIENCE = 60.0  # seconds for anything; a test that needs nearly so many has failed


class Running:
    """A ``kvmmig`` process in a session of its own, with all that it has written so far."""

    def __init__(self, command: Sequence[str], cwd: Path, **pipes: int | None) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            start_new_session=True,
            stdin=pipes.get("stdin", subprocess.DEVNULL),
            stdout=pipes.get("stdout", subprocess.PIPE),
            stderr=pipes.get("stderr", subprocess.PIPE),
        )
        self.pid = self.process.pid
        self._changed = threading.Condition()
        self._written = {"stdout": bytearray(), "stderr": bytearray()}
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream))
            for name, stream in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
            if stream is not None
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, stream: IO[bytes]) -> None:
        while data := os.read(stream.fileno(), 65536):
            with self._changed:
                self._written[name] += data
                self._changed.notify_all()

    @property
    def stdout(self) -> str:
        return self._written["stdout"].decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self._written["stderr"].decode(errors="replace")

    def type(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def wait_for(self, seen: Callable[[Running], bool]) -> None:
        """Until ``seen`` is true, which may look at more than the output."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not seen(self):
                assert self.process.poll() is None, self
                assert time.monotonic() < deadline, self
                self._changed.wait(0.01)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        os.killpg(self.pid, number)  # as a terminal does it: everybody in the foreground gets it

    def end(self, *, logs: bool = False) -> int:
        """Wait for its exit status; nothing that it started may outlive it. Only ``logs`` have tracebacks."""
        status = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        with pytest.raises(ProcessLookupError):
            os.killpg(self.pid, 0)
        assert logs or "Traceback" not in self.stderr, self
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def __repr__(self) -> str:
        return f"status {self.process.poll()}\n-- stdout\n{self.stdout}\n-- stderr\n{self.stderr}"


class Kvmmig:
    """Starts commands in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Running] = []

    def start(self, *arguments: str, wrapper: Path | None = None, **pipes: int | None) -> Running:
        script = ["-m", "kvmmig"] if wrapper is None else [str(wrapper)]
        running = Running([sys.executable, *script, *arguments], self.directory, **pipes)
        self.started.append(running)
        return running

    def __call__(self, *arguments: str, wrapper: Path | None = None) -> Running:
        """Run a command to its end."""
        running = self.start(*arguments, wrapper=wrapper)
        running.end()
        return running

    def program(self, name: str, source: str) -> str:
        need_nasm()
        path = self.directory / name
        path.write_text(source)
        return str(path)


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the machines of this test, and no others, are found by their names. Empty again at the end."""
    # pytest's own directories have names too long for a Unix socket in them.
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        yield Path(short) / "kvmmig"


@pytest.fixture(autouse=True)
def _descriptors_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command run in this process decides about its descriptors is not decided for the next test."""
    monkeypatch.setattr(descriptors, "_table", type(descriptors._table)())


@pytest.fixture
def kvmmig(tmp_path: Path, runtime_directory: Path) -> Iterator[Kvmmig]:
    made = Kvmmig(tmp_path)
    yield made
    for running in made.started:
        running.close()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process, where no other is needed: its status and what it wrote."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvmmig", *arguments])
        capfd.readouterr()
        status = main()
        out, err = capfd.readouterr()
        return status, out, err

    return run


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    """A terminal to run a command on, in the test's directory."""
    made = Screen(tmp_path)
    yield made
    made.close()


@pytest.fixture
def background(kvmmig: Kvmmig, runtime_directory: Path) -> Iterator[Callable[..., str]]:
    """Starts machines in the background, by a whole command line; returns the name, and ends them later."""

    def start(*arguments: str) -> str:
        started = kvmmig.start(*arguments, "--detach")
        assert started.process.wait(PATIENCE) == 0, started
        started.close()
        return started.stdout.strip()

    yield start
    for name in rundir.names():
        send_signal(name, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while rundir.answers(name):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def processes_naming(text: str) -> list[str]:
    """The command lines, of this machine's processes, that have ``text`` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if text in line:
            found.append(line)
    return found


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    """Call it at the end: no process names the test's directory, and there is no file of a failed save."""

    def check() -> None:
        deadline = time.monotonic() + PATIENCE
        while found := processes_naming(str(tmp_path)):  # a killed process takes a moment to be gone
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        assert not list(tmp_path.glob("*.img"))
        assert not list(tmp_path.glob(".*.partial"))

    return check
