"""``--transport SCHEME`` of ``save`` and ``restore``: the transports that store what they are given."""

from __future__ import annotations

import os
from dataclasses import replace

from kvmmig.cli import rundir
from kvmmig.cli.logs import logging_to, to_stderr
from kvmmig.errors import BadURI, KvmmigError
from kvmmig.transport.places import check_place, protect
from kvmmig.transport.registry import registrations, transport_for
from kvmmig.transport.uri import TransportURI

_ANYTHING = "/guest.img"
_PATHS = ("file", "pipe", "unix")  # the schemes whose targets are paths of this host


def storing_uri(scheme: str, path: str) -> TransportURI:
    """The URI of a saved guest. Raises `BadURI` where that transport is unknown, or stores nothing.

    Raises what the transport itself says of such a path. A relative path is one of this process's.
    """
    uri = TransportURI(scheme, os.path.abspath(path))
    with logging_to(to_stderr):
        stores = transport_for(uri).stores
    if not stores:
        raise BadURI(
            f"--transport {scheme}: it stores nothing, so no guest can be saved by it; these do: "
            f"{', '.join(storing_schemes())}"
        )
    return uri


def checked(uri: TransportURI) -> TransportURI:
    """The same URI with a path that means the same to a machine's process as to this one.

    Raises `BadURI` where a guest would be written to a path that no guest can be saved to.
    """
    if uri.scheme not in _PATHS or not uri.target or "\0" in uri.target:
        return uri  # the transport itself says what is wrong with it
    if uri.scheme != "unix":
        protect(rundir.directory())
        check_place(uri.target)
    return replace(uri, target=os.path.abspath(uri.target))


def storing_schemes() -> list[str]:
    """The schemes that `storing_uri` takes: built-in ones and those that packages bring, sorted."""
    with logging_to(None):  # one that can't be loaded is nobody's affair here
        return [one.scheme for one in registrations() if _stores(one.scheme)]


def _stores(scheme: str) -> bool:
    try:
        return transport_for(TransportURI(scheme, _ANYTHING)).stores
    except KvmmigError:  # it can't be loaded, or its targets are no paths
        return False
