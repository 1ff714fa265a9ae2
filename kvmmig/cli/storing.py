"""``--transport SCHEME`` of ``save`` and ``restore``: the transports that store what they are given."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

from kvmmig.cli import rundir
from kvmmig.cli.logs import logging_to, to_stderr
from kvmmig.cli.statuses import WrongCommandLine
from kvmmig.errors import BadURI, KvmmigError, TransportError
from kvmmig.transport.contract import Transport
from kvmmig.transport.places import check_place, protect
from kvmmig.transport.registry import (
    Registration,
    registrations,
    target_is_path,
    transport_for,
    wrapper_registrations,
)
from kvmmig.transport.uri import TransportURI


def storing_uri(scheme: str, target: str) -> TransportURI:
    """The URI of a saved guest. Raises `BadURI` where that transport is unknown, or stores nothing.

    Raises what the transport itself says of such a target. Where targets are paths, a relative one is one of
    this process's; otherwise the target is as it was given.
    """
    with logging_to(to_stderr):
        uri = TransportURI(scheme, os.path.abspath(target) if target_is_path(scheme) else target)
        stores = transport_for(uri).stores
    if not stores:
        raise BadURI(
            f"--transport {scheme}: it stores nothing, so no guest can be saved by it; these do: "
            f"{', '.join(storing_schemes())}"
        )
    return uri


def checked(uri: TransportURI) -> TransportURI:
    """The same URI with a path that means the same to a machine's process as to this one.

    Raises `BadURI` where a guest would be written to a path that no guest can be saved to, and
    `WrongCommandLine` for what its transport does not understand: that is the first thing to be said.
    """
    if not uri.target or "\0" in uri.target:
        return uri  # the transport itself says what is wrong with it
    with logging_to(to_stderr):
        check_makes_sense(uri, all_known=False)
        stored = target_is_path(uri.scheme)
    if stored:
        protect(rundir.directory())
        check_place(uri.target)
    elif uri.scheme != "unix":
        return uri
    return replace(uri, target=os.path.abspath(uri.target))


def check_makes_sense(uri: TransportURI, *, all_known: bool) -> None:
    """Raise `WrongCommandLine` for a URI that no transport understands, unless only a machine can know.

    Without ``all_known``, so is a scheme that nobody has here: the machine may have others.
    """
    if uri.scheme == "fd" or any(name.endswith("file") for name in uri.options):
        return  # the descriptor, or the file, is the machine's own
    if not all_known:
        schemes = {one.scheme for one in registrations()}
        wrappers = {one.scheme for one in wrapper_registrations()}
        if uri.scheme not in schemes or not wrappers.issuperset(uri.wrappers):
            return
    with suppress(TransportError):  # a package that can't be imported here: the machine says what it finds
        try:
            transport_for(uri)
        except BadURI as error:
            raise WrongCommandLine(str(error)) from error


def storing_schemes() -> list[str]:
    """The schemes whose transports all store: built-in ones and those that packages bring, sorted."""
    with logging_to(None):  # one that can't be loaded is nobody's affair here
        return [one.scheme for one in registrations() if _stores(one)]


def _stores(one: Registration[Transport]) -> bool:
    try:
        return bool(one.load().stores)
    except KvmmigError:  # it can't be loaded
        return False
