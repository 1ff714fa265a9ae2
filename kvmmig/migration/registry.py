"""From a URI to a transport: the built-in ones by lazy strings, everybody else's by entry points.

Nothing is imported before it is used. A package of yours brings a transport with this in its
``pyproject.toml``; see ``transports/README.md``::

    [project.entry-points."kvmmig.transports"]
    carrier-pigeon = "pigeons.transport:PigeonTransport"
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from kvmmig.errors import BadURI, TransportError
from kvmmig.migration.transport import Transport, TransportURI

GROUP = "kvmmig.transports"

_BUILT_IN = {
    "tcp": "kvmmig_transports.tcp:TcpTransport",
    "unix": "kvmmig_transports.unix:UnixTransport",
    "pipe": "kvmmig_transports.pipe:PipeTransport",
    "file": "kvmmig_transports.file:FileTransport",
    "exec": "kvmmig_transports.exec:ExecTransport",
}
_registered: dict[str, type[Transport]] = {}


@dataclass(frozen=True, slots=True)
class Registration:
    """A scheme that can be used, and where its transport comes from. ``load`` imports it."""

    scheme: str
    origin: str
    load: Callable[[], type[Transport]]


def register(scheme: str, transport: type[Transport]) -> None:
    """Add a transport for this process alone, as an example or a test does. It goes before all others."""
    _registered[scheme] = transport


def registrations() -> tuple[Registration, ...]:
    """All that can be used, by scheme. `register` goes before built-in, that before installed."""
    found: dict[str, Registration] = {}
    for scheme, transport in _registered.items():
        found[scheme] = Registration(scheme, "this program", partial(_same, transport))
    for scheme, path in _BUILT_IN.items():
        found.setdefault(scheme, Registration(scheme, "built in", partial(_import, path)))
    for entry in entry_points(group=GROUP):
        origin = entry.dist.name if entry.dist is not None else "an installed package"
        found.setdefault(entry.name, Registration(entry.name, origin, partial(_load, entry)))
    return tuple(found[scheme] for scheme in sorted(found))


def transport_for(uri: str | TransportURI) -> Transport:
    """The transport that a URI names.

    Raises `BadURI` where the URI is not understood or nobody has its scheme, and `TransportError` where the
    package that has it can't be imported.
    """
    parsed = TransportURI.parse(uri) if isinstance(uri, str) else uri
    if parsed.wrappers:
        raise BadURI(f"{str(parsed)!r}: there is no wrapper {parsed.wrappers[0]!r}; write it without")
    known = registrations()
    for registration in known:
        if registration.scheme == parsed.scheme:
            return registration.load()(parsed)
    raise BadURI(
        f"{str(parsed)!r}: no transport is called {parsed.scheme!r}; there are "
        f"{', '.join(one.scheme for one in known)} (others come with packages that offer {GROUP!r})"
    )


def _same(transport: type[Transport]) -> type[Transport]:
    return transport


def _import(path: str) -> type[Transport]:
    module, _, name = path.partition(":")
    transport: type[Transport] = getattr(importlib.import_module(module), name)
    return transport


def _load(entry: EntryPoint) -> type[Transport]:
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a stranger's package does at import is not our traceback
        raise TransportError(
            f"the transport {entry.name!r} ({entry.value}) can't be loaded: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise TransportError(
            f"the transport {entry.name!r} ({entry.value}) is no Transport; derive it from "
            "kvmmig.migration.transport.Transport"
        )
    return loaded
