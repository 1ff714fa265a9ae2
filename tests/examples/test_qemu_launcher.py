"""Tools of QEMU's launch a machine by ``examples/as_qemu.py``, as if it were their binary."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.monitor.processes import PATIENCE

_ROOT = Path(__file__).parents[2]
_LAUNCHER = _ROOT / "examples" / "as_qemu.py"
_SOURCE = os.environ.get("QEMU_SOURCE")
_GUEST = {
    "KVMMIG_GUEST": "dirtier --set hot=1MiB",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


@contextmanager
def launched(directory: Path, *arguments: str, fd: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **_GUEST, "XDG_RUNTIME_DIR": str(directory)}
    command = [sys.executable, str(_LAUNCHER), "-display", "none", "-vga", "none", *arguments]
    with subprocess.Popen(command, env=environment, pass_fds=[fd]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.kvm
def test_a_tool_hands_a_connected_socket_over_and_finds_its_guest_paused_as_it_asked(tmp_path: Path) -> None:
    """As `QEMUMachine` does: the same command line, the same client."""
    ours, theirs = socket.socketpair()
    monitor = ["-chardev", f"socket,id=mon,fd={theirs.fileno()}", "-mon", "chardev=mon,mode=control"]
    with launched(tmp_path, *monitor, "-m", "16", "-smp", "2", "-S", fd=theirs.fileno()) as process:
        theirs.close()
        qmp = QEMUMonitorProtocol(ours)
        greeting: Any = qmp.connect()
        assert greeting["QMP"]["version"]["package"].startswith("kvmmig")
        paused: Any = qmp.cmd("query-status")
        assert paused["running"] is False, "-S"
        qmp.cmd("cont")
        assert qmp.cmd("query-status") == {"status": "running", "running": True}, "at once"
        cpus: Any = qmp.cmd("query-cpus-fast")
        assert len(cpus) == 2
        assert qmp.cmd("human-monitor-command", **{"command-line": "info status"}) == "VM status: running\r\n"
        qmp.cmd("quit")
        with suppress(EOFError):  # as from QEMU, when it is gone
            qmp.close()
        assert process.wait(PATIENCE) == 0


@pytest.mark.kvm
@pytest.mark.skipif(_SOURCE is None, reason="QEMU_SOURCE=PATH names no tree of QEMU's sources")
def test_guestperf_of_qemus_runs_to_its_end(tmp_path: Path) -> None:
    """`QEMUMachine`, which it uses, listens for two machines, and one guest moves from one to the other."""
    assert _SOURCE is not None
    directory = next(
        path for path in Path(_SOURCE, "tests").glob("migration*") if (path / "guestperf.py").exists()
    )
    report = tmp_path / "report.json"
    options = ["--kernel", "/dev/null", "--initrd", "/dev/null", "--transport", "unix", "--sleep", "2"]
    subprocess.run(
        [sys.executable, "guestperf.py", "--binary", str(_LAUNCHER), *options, "--output", str(report)],
        cwd=directory,
        env={**os.environ, **_GUEST, "XDG_RUNTIME_DIR": str(tmp_path)},
        check=True,
        timeout=PATIENCE,
    )
    assert '"status": "completed"' in report.read_text()
