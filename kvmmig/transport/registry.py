"""From a URI to a transport: the built-in ones by lazy strings, everybody else's by entry points.

Nothing is imported before it is used. A package of yours brings a transport, or a wrapper, with this in its
``pyproject.toml``; see ``transports/README.md``::

    [project.entry-points."kvmmig.transports"]
    carrier-pigeon = "pigeons.transport:PigeonTransport"

    [project.entry-points."kvmmig.wrappers"]
    flock = "pigeons.transport:FlockWrapper"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from kvmmig.errors import BadURI, TransportError
from kvmmig.transport.contract import Transport
from kvmmig.transport.guard import blaming
from kvmmig.transport.uri import TransportURI
from kvmmig.transport.wrapper import Wrapper

GROUP = "kvmmig.transports"
WRAPPERS_GROUP = "kvmmig.wrappers"

_BUILT_IN = {
    "tcp": "kvmmig_transports.tcp:TcpTransport",
    "unix": "kvmmig_transports.unix:UnixTransport",
    "pipe": "kvmmig_transports.pipe:PipeTransport",
    "file": "kvmmig_transports.file:FileTransport",
    "exec": "kvmmig_transports.exec:ExecTransport",
    "fd": "kvmmig_transports.fd:FdTransport",
}
_BUILT_IN_WRAPPERS = {
    "throttle": "kvmmig_transports.throttle:ThrottleWrapper",
    "fault": "kvmmig_transports.fault:FaultWrapper",
    "tls": "kvmmig_transports.tls:TlsWrapper",
    "secret": "kvmmig_transports.secret:SecretWrapper",
    "zstd": "kvmmig_transports.zstd:ZstdWrapper",
    "checksum": "kvmmig_transports.checksum:ChecksumWrapper",
    "tap": "kvmmig_transports.tap:TapWrapper",
}
_registered: dict[str, type[Transport]] = {}
_registered_wrappers: dict[str, type[Wrapper]] = {}

T = TypeVar("T", bound=Transport)


@dataclass(frozen=True, slots=True)
class Registration(Generic[T]):
    """A scheme, or a wrapper's name, that can be used, and where it comes from. ``load`` imports it."""

    scheme: str
    origin: str
    load: Callable[[], type[T]]


def register(scheme: str, transport: type[Transport]) -> None:
    """Add a transport for this process alone, as an example or a test does. It goes before all others."""
    _registered[scheme] = transport


def register_wrapper(name: str, wrapper: type[Wrapper]) -> None:
    """Add a wrapper for this process alone, as `register` does a transport."""
    _registered_wrappers[name] = wrapper


def registrations() -> tuple[Registration[Transport], ...]:
    """All transports, by scheme. `register` goes before built-in, that before installed."""
    return _all(_transports())


def wrapper_registrations() -> tuple[Registration[Wrapper], ...]:
    """All wrappers, by name, as `registrations` has the transports."""
    return _all(_wrappers())


def target_is_path(scheme: str) -> bool:
    """Whether a transport's targets are paths of this host, by its `Transport.target_is_path`.

    False where nobody has that scheme. Raises `TransportError` where its package can't be imported.
    """
    found = _first(scheme, _transports())
    return found is not None and found.load().target_is_path


def transport_for(uri: str | TransportURI) -> Transport:
    """The transport that a URI names, with its wrappers around it.

    Raises `BadURI` where the URI is not understood or nobody has its scheme or a wrapper, and
    `TransportError` where the package that has it can't be imported.
    """
    parsed = TransportURI.parse(uri) if isinstance(uri, str) else uri
    if parsed.wrappers:
        name = parsed.wrappers[0]
        if name in parsed.wrappers[1:]:
            raise BadURI(f"{str(parsed)!r} has the wrapper {name!r} twice; have it once")
        inner = transport_for(parsed.unwrapped()[1])
        found = _find(name, _wrappers, parsed, "wrapper", WRAPPERS_GROUP)
        return _made(found, lambda wrapper: wrapper(parsed, inner))
    return _made(_find(parsed.scheme, _transports, parsed, "transport", GROUP), lambda make: make(parsed))


def _made(found: Registration[T], make: Callable[[type[T]], T]) -> T:
    """Whatever a stranger's class does is a sentence."""
    with blaming(f"{found.scheme!r} ({found.origin})", "its constructor", TransportError):
        transport = make(found.load())
        transport.origin = found.origin
        return transport


def _find(
    name: str, candidates: Callable[[], Iterator[Registration[T]]], uri: TransportURI, what: str, group: str
) -> Registration[T]:
    found = _first(name, candidates())
    if found is not None:
        return found
    known = [one.scheme for one in _all(candidates())]
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean {near[0]!r}? There" if near else "there"
    raise BadURI(
        f"{str(uri)!r}: no {what} is called {name!r}; {meant} are {', '.join(known)} (others come with "
        f"packages that offer {group!r})"
    )


def _first(scheme: str, candidates: Iterator[Registration[T]]) -> Registration[T] | None:
    return next((one for one in candidates if one.scheme == scheme), None)


def _all(candidates: Iterator[Registration[T]]) -> tuple[Registration[T], ...]:
    found: dict[str, Registration[T]] = {}
    for one in candidates:
        found.setdefault(one.scheme, one)
    return tuple(found[scheme] for scheme in sorted(found))


def _transports() -> Iterator[Registration[Transport]]:
    return _candidates(_registered, _BUILT_IN, GROUP, Transport)


def _wrappers() -> Iterator[Registration[Wrapper]]:
    return _candidates(_registered_wrappers, _BUILT_IN_WRAPPERS, WRAPPERS_GROUP, Wrapper)


def _candidates(
    registered: dict[str, type[T]], built_in: dict[str, str], group: str, base: type
) -> Iterator[Registration[T]]:
    """The first of a scheme counts. What is installed comes last: to find out takes some 20 ms."""
    for scheme, transport in registered.items():
        yield Registration(scheme, "from this program", partial(_same, transport))
    for scheme, path in built_in.items():
        yield Registration(scheme, "built in", partial(_import, path))
    for entry in entry_points(group=group):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
        yield Registration(entry.name, f"from {package}", partial(_load, entry, base))


def _same(transport: type[T]) -> type[T]:
    return transport


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _load(entry: EntryPoint, base: type) -> Any:
    what = base.__name__
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a stranger's package does at import is not our traceback
        raise TransportError(
            f"the {what.lower()} {entry.name!r} ({entry.value}) can't be loaded: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise TransportError(
            f"the {what.lower()} {entry.name!r} ({entry.value}) is no {what}; derive it from "
            f"kvmmig.transport.{what}"
        )
    return loaded
