"""A monitor with a few commands of the tests' own, and clients that are as rude as they like."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmmig.errors import WrongState
from kvmmig.qmp import Arguments, CommandTable, QMPError, QMPServer, Session

PATIENCE = 60.0  # seconds for anything; a test that needs nearly so many has failed


class EchoArguments(Arguments, frozen=True):
    text: str
    number: int | None = None
    max_size: float = 0.0
    switches: list[bool] = []  # noqa: RUF012 - msgspec copies it


class Commands:
    """The table, and what its handlers wait for and have seen."""

    def __init__(self) -> None:
        self.table = CommandTable()
        self.go = trio.Event()
        self.waiting = trio.Event()
        self.finished: list[str] = []
        self.sessions: list[Session] = []
        self.table.add("echo", EchoArguments, self._echo)
        for name in ("hello", "wait", "big", "bug", "refuse", "gone"):
            self.table.add(name, None, getattr(self, f"_{name}"))

    async def _echo(self, _session: Session, arguments: EchoArguments) -> object:
        return {"text": arguments.text}

    async def _hello(self, session: Session, _: object) -> None:
        self.sessions.append(session)

    async def _wait(self, _session: Session, _: object) -> None:
        self.waiting.set()
        await self.go.wait()
        self.finished.append("wait")

    async def _big(self, _session: Session, _: object) -> object:
        return ["x" * 1000] * 100

    async def _bug(self, _session: Session, _: object) -> None:
        raise ZeroDivisionError("of all things")

    async def _refuse(self, _session: Session, _: object) -> None:
        raise WrongState("the machine is asleep; wake it up first")

    async def _gone(self, _session: Session, _: object) -> None:
        raise QMPError("Device 'x' not found", error_class="DeviceNotFound")


@pytest.fixture
def commands() -> Commands:
    return Commands()


class RawClient:
    """Sends bytes, and reads lines."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._data = b""

    async def send(self, data: bytes | str | dict[str, Any]) -> None:
        if isinstance(data, dict):
            data = json.dumps(data)
        await self.stream.send_all(data.encode() if isinstance(data, str) else data)

    async def line(self) -> bytes:
        """The next line; b"" at the end."""
        while b"\n" not in self._data:
            try:
                more = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                more = b""
            if not more:
                return b""
            self._data += more
        line, _, self._data = self._data.partition(b"\n")
        return line + b"\n"

    async def next(self) -> dict[str, Any]:
        line = await self.line()
        assert line.endswith(b"\r\n"), line
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def ask(self, data: bytes | str | dict[str, Any]) -> dict[str, Any]:
        await self.send(data)
        return await self.next()

    async def negotiate(self) -> None:
        assert "QMP" in await self.next()
        assert await self.ask({"execute": "qmp_capabilities"}) == {"return": {}}


class Served:
    """A monitor that listens on a Unix socket."""

    def __init__(self, server: QMPServer, address: str) -> None:
        self.server = server
        self.address = address
        self.clients: list[RawClient] = []

    async def raw(self) -> RawClient:
        client = RawClient(await trio.open_unix_socket(self.address.removeprefix("unix:")))
        self.clients.append(client)
        return client

    async def negotiated(self) -> RawClient:
        client = await self.raw()
        await client.negotiate()
        return client

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.005)


@pytest.fixture
async def served(
    request: pytest.FixtureRequest, commands: Commands, tmp_path: Path, nursery: trio.Nursery
) -> AsyncIterator[Served]:
    server = QMPServer(commands.table, version="kvmmig 0.4.1")
    with trio.fail_after(PATIENCE if request.node.get_closest_marker("slow") is None else 100 * PATIENCE):
        made = Served(server, await nursery.start(server.serve, f"unix:{tmp_path}/a.sock"))
        yield made
        for client in made.clients:
            await client.stream.aclose()


def error(desc: str, error_class: str = "GenericError", **more: object) -> dict[str, Any]:
    """The reply to a command that failed."""
    return {"error": {"class": error_class, "desc": desc}, **more}


def same(one: int, other: int) -> bool:
    """Whether two descriptors are of one open file."""
    return os.path.sameopenfile(one, other)


def descriptors() -> set[str]:
    """What this process has open, by number and name."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:  # the directory's own
            continue
    return found
