"""The page's HTTP server: hypercorn, on this host's loopback."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from kvmmig.cli.livepage.application import Application
from kvmmig.errors import KvmmigError
from kvmmig.lab.extras import needed_for

with needed_for("watch --web", "web"):
    from hypercorn.config import Config
    from hypercorn.trio import serve

_LOOPBACK = "127.0.0.1"
_BACKLOG = 64
#: Milliseconds. hypercorn waits for a browser that takes nothing, at its own end too; the kernel gives it up.
_STALLED = 5000


@asynccontextmanager
async def serving(application: Application, port: int) -> AsyncIterator[str]:
    """Serve it as long as the block lasts; yields its URL. With ``port`` 0 the kernel chooses one.

    Raises `KvmmigError` where that port is not to be had. The end of the block takes 5 s at most, where a
    browser takes nothing more.
    """
    sock = _listen(port)
    url = f"http://{_LOOPBACK}:{sock.getsockname()[1]}/"
    config = Config()
    config.bind = [f"fd://{sock.detach()}"]  # hypercorn closes it
    config.accesslog = None
    config.errorlog = logging.getLogger(__name__)
    config.include_server_header = False
    config.graceful_timeout = 0.0
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, application, config, mode="asgi"))
        yield url
        nursery.cancel_scope.cancel()


def _listen(port: int) -> socket.socket:
    try:
        sock = socket.create_server((_LOOPBACK, port), backlog=_BACKLOG)
    except OSError as error:
        why = "another process listens there already" if error.errno == errno.EADDRINUSE else error.strerror
        hint = "leave --port out, and the kernel chooses one"
        raise KvmmigError(f"the page can't be served on port {port}: {why}; {hint}") from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED)
    return sock
