"""A headless Chromium, driven by its own protocol through a pipe.

https://chromedevtools.github.io/devtools-protocol has the protocol.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """One page in a browser of its own."""

    def __init__(self, to: trio.lowlevel.FdStream, back: trio.lowlevel.FdStream) -> None:
        self._to = to
        self._back = back
        self._input = bytearray()
        self._ids = itertools.count(1)
        self._session = ""
        #: What the page's script, or the browser about the page, has complained of.
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Have a command carried out, and return its result."""
        message = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        await self._to.send_all(json.dumps(message).encode() + b"\0")
        while True:
            reply = await self._receive()
            if reply.get("id") == message["id"]:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result
            if reply.get("method") == "Runtime.exceptionThrown" or (
                reply.get("method") == "Log.entryAdded" and reply["params"]["entry"]["level"] == "error"
            ):
                self.complaints.append(json.dumps(reply["params"]))

    async def open(self, url: str) -> None:
        """Go there."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        await self.call("Runtime.enable")
        await self.call("Log.enable")
        await self.call("Page.navigate", url=url)

    async def until(self, expression: str) -> Any:
        """Wait until this script's value is truthy; the value."""
        while True:
            found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
            if found["result"].get("value"):
                return found["result"]["value"]
            await trio.sleep(0.05)

    async def picture(self, path: Path) -> None:
        """Write a PNG of what it shows."""
        taken = await self.call("Page.captureScreenshot")
        await trio.Path(path).write_bytes(base64.b64decode(taken["data"]))

    async def _receive(self) -> dict[str, Any]:
        while (end := self._input.find(b"\0")) < 0:
            data = await self._back.receive_some()
            assert data, "the browser has ended"
            self._input += data
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        message: dict[str, Any] = json.loads(line)
        return message


@asynccontextmanager
async def chromium(home: Path) -> AsyncIterator[Chromium]:
    """A browser as long as the block lasts; what it keeps is in ``home``."""
    assert CHROMIUM is not None
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    flags = ["--headless=new", "--disable-gpu", f"--user-data-dir={home}", "--window-size=1600,1000"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # it has none for root
    script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    command = ["bash", "-c", script, CHROMIUM, "--remote-debugging-pipe", *flags]
    async with (
        trio.lowlevel.FdStream(to) as sending,
        trio.lowlevel.FdStream(back) as receiving,
        trio.open_nursery() as nursery,
    ):
        fds = (theirs_in, theirs_out)
        run = partial(trio.run_process, command, pass_fds=fds, capture_stderr=True, check=False)
        await nursery.start(run)
        for fd in fds:
            os.close(fd)
        yield Chromium(sending, receiving)
        nursery.cancel_scope.cancel()
