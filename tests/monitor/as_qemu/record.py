"""Ask QEMU, and write down what it answers: ``python -m tests.monitor.as_qemu.record [QEMU]``.

It prints the table's lines, one for each input. Where kvmmig answers otherwise, ``why`` names the reason,
which docs/monitor.md has, and ``kvmmig`` what it answers: both are kept from the table that there is.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.monitor.as_qemu.inputs import SCENES, Scene

TABLE = Path(__file__).with_name("answers.jsonl")
PATIENCE = 60.0  # seconds
_END = "end of input"  # an id
_BY_CHANCE = re.compile(r'"thread-id": [1-9][0-9]*|unix:[^",]*')  # what is another one each time


def _always(found: re.Match[str]) -> str:
    return "unix:PATH" if found[0].startswith("unix") else '"thread-id": 1'


class Connection:
    """A client that is told everything, event or reply, in the order in which it comes."""

    def __init__(self, sock: socket.socket, *, negotiated: bool) -> None:
        self._socket = sock
        self._socket.settimeout(PATIENCE)
        self._lines = sock.makefile("rb")
        self.greeting = json.loads(self._lines.readline())
        if negotiated:
            self.say('{"execute": "qmp_capabilities"}')

    def say(self, text: str) -> list[dict[str, Any]]:
        """Send an input; all that is answered to it, until the connection ends if it does."""
        end = {"execute": "query-name", "id": _END}
        told: list[dict[str, Any]] = []
        try:
            self._socket.sendall(f"{text}\n{json.dumps(end)}\n".encode("latin-1"))
            for line in self._lines:
                message = json.loads(_BY_CHANCE.sub(_always, line.decode()))
                if message.get("id") == _END:
                    return told
                message.pop("timestamp", None)
                told.append(message)
        except ConnectionError:
            pass
        return [*told, {"end of connection": True}]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def qemu(binary: str, scene: Scene, directory: Path) -> Iterator[Path]:
    """A machine of QEMU's, and its monitor's socket."""
    path = directory / f"{scene.name}.sock"
    incoming = ["-incoming", "defer"] if scene.machine == "awaiting" else []
    options = ["-accel", "tcg", "-m", "16M", "-nodefaults", "-display", "none", "-name", "the-dirtier"]
    with socket.socket(socket.AF_UNIX) as listener:
        # It is given a listening socket, so nobody has to wait for it.
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        monitor = ["-chardev", f"socket,id=m,fd={fd},server=on,wait=off", "-mon", "chardev=m,mode=control"]
        process = subprocess.Popen([binary, *options, *monitor, *incoming], pass_fds=[fd])
    try:
        yield path
    finally:
        process.kill()
        process.wait()


def answers(scene: Scene, path: Path) -> list[list[dict[str, Any]]]:
    """What the monitor there answers to each input."""

    def connect(negotiated: bool) -> Connection:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return Connection(sock, negotiated=negotiated)

    if scene.negotiated:
        with closing(connect(True)) as client:
            return [client.say(text) for text in scene.inputs]
    found = []
    for text in scene.inputs:
        with closing(connect(False)) as client:
            found.append(client.say(text))
    return found


def version_of(binary: str) -> str:
    """Such as "10.0.2"."""
    said = subprocess.run([binary, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return said.split("version ")[1].split()[0]


def record(binary: str) -> list[dict[str, Any]]:
    """The table's rows, without kvmmig's part."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for scene in SCENES:
            with qemu(binary, scene, Path(directory)) as path:
                said = answers(scene, path)
            rows += [
                {"scene": scene.name, "input": text, "qemu": told}
                for text, told in zip(scene.inputs, said, strict=True)
            ]
    return rows


def read_table() -> tuple[str, list[dict[str, Any]]]:
    """The version of QEMU that it was recorded from, and the rows."""
    first, *rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return first["version"], rows


def main() -> None:
    binary = sys.argv[1] if len(sys.argv) > 1 else "qemu-system-x86_64"
    kept = {(row["scene"], row["input"]): row for row in read_table()[1]}
    print(json.dumps({"version": version_of(binary)}))
    for row in record(binary):
        old = kept.get((row["scene"], row["input"]), {})
        print(json.dumps(row | {key: old[key] for key in ("why", "kvmmig") if key in old}))


if __name__ == "__main__":
    main()
