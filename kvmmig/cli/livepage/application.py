"""The page over HTTP, as an ASGI application: what there is to get, and who may get it.

All of it is to be read only. A browser asks for whatever any page tells it to, so it is not enough that it is
this user's browser: who asks by another name than this host's own is refused (DNS rebinding), and what comes
back can be read by this page alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import trio

from kvmmig.cli.livepage.viewers import Viewers
from kvmmig.transport.peers import Peer, peer_between

if TYPE_CHECKING:
    from hypercorn.typing import (
        ASGIReceiveCallable,
        ASGISendCallable,
        HTTPResponseStartEvent,
        HTTPScope,
        Scope,
    )

_MOST_VIEWERS = 64
#: Names of this host's loopback. A page of another name that resolves to it is not let in by its own.
_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEADERS = (
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
}
_EVENTS = "/events"


@dataclass(frozen=True)
class _Answer:
    status: int
    content_type: bytes
    body: bytes


class Application:
    """Serves the page's files, and its stream of server-sent events at ``/events``."""

    def __init__(self, viewers: Viewers, *, insecure: bool) -> None:
        """With ``insecure`` every user of this host may look; else this process's own user, and root."""
        self._viewers = viewers
        self._insecure = insecure
        self._files = _page_files()

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """One request. Ends when the browser is gone, or has what it asked for."""
        if scope["type"] == "lifespan":
            await _start_and_end(receive, send)
        if scope["type"] != "http":  # there are no web sockets
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _send(send, refusal, scope)
        elif scope["path"] == _EVENTS and scope["method"] == "GET":
            await self._stream(receive, send)
        else:
            await _send(send, self._files.get(scope["path"], _refused(404, "there is no such page")), scope)

    def _refusal(self, scope: HTTPScope) -> _Answer | None:
        client, server = scope["client"], scope["server"]
        if client is None or server is None:
            return _refused(403, "nobody knows who you are")
        peer = peer_between(client, server)
        if not (peer.trusted or (self._insecure and peer.local)):
            return _refused(403, f"this page is for its own user and root, and you are {_described(peer)}")
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or _without_port(hosts[0]) not in _NAMES:
            return _refused(403, "ask for this page as http://127.0.0.1 or http://localhost, with its port")
        if scope["method"] not in ("GET", "HEAD"):
            return _refused(405, "this page can only be read")
        if scope["path"] == _EVENTS and len(self._viewers) >= _MOST_VIEWERS:
            return _refused(503, f"{_MOST_VIEWERS} look already, and no more may")
        return None

    async def _stream(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        async with trio.open_nursery() as nursery:

            async def until_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_gone)
            with self._viewers.present() as viewer:
                await send(_start(200, b"text/event-stream"))
                while True:
                    body = await viewer.next_message()
                    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _start_and_end(receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """There is nothing to do at the server's start and end, but it waits for the word."""
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _page_files() -> Mapping[str, _Answer]:
    found = {}
    for file in files("kvmmig.cli.livepage").joinpath("page").iterdir():
        name = file.name
        path = "/" if name == "index.html" else f"/{name}"
        found[path] = _Answer(200, _TYPES[name.rpartition(".")[2]], file.read_bytes())
    return found


def _refused(status: int, sentence: str) -> _Answer:
    return _Answer(status, b"text/plain; charset=utf-8", f"kvmmig: {sentence}\n".encode())


def _without_port(host: bytes) -> str:
    text = host.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    return name if colon and port.isdecimal() else text


def _described(peer: Peer) -> str:
    return f"user {peer.user}" if peer.user is not None else "somebody whom the kernel does not name"


async def _send(send: ASGISendCallable, answer: _Answer, scope: HTTPScope) -> None:
    await send(_start(answer.status, answer.content_type, len(answer.body)))
    body = answer.body if scope["method"] != "HEAD" else b""
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _start(status: int, content_type: bytes, length: int | None = None) -> HTTPResponseStartEvent:
    headers = [(b"content-type", content_type), *_HEADERS]
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    return {"type": "http.response.start", "status": status, "headers": headers}
