"""``--secret-file FILE``: the short form of ``secret+URI?secret.key.file=FILE``."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmmig.transport.uri import TransportURI

_WRAPPER = "secret"
_OPTION = "secret.key.file"


def with_secret(uri: TransportURI, file: str | None) -> TransportURI:
    """The URI with `secret+` in front, its file a path that any process understands; as it is without one.

    Raises `click.UsageError` where the URI has a secret already.
    """
    if file is None:
        return uri
    if _WRAPPER in uri.wrappers:
        raise click.UsageError(f"{str(uri)!r} has a secret of its own, so --secret-file can't go with it")
    options = {**uri.options, _OPTION: os.path.abspath(file)}
    return replace(uri, options=options, wrappers=(_WRAPPER, *uri.wrappers))
