"""Whose process may be at the far end of a connection that this side makes, as its URI says it."""

from __future__ import annotations

import pwd

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport.contract import AnyChannel, Option
from kvmmig.transport.uri import TransportURI
from kvmmig.units import UID, parse_count

_ANY = "any"


class FarEnd:
    """The option ``user`` of a transport whose kernel knows the users at both ends.

    Without it nothing is checked here: whoever uses the channel trusts its own user, and root.
    """

    option = Option(
        "user",
        "for a source: whose process listens there, by name or number, where that is on this host, or any; "
        "else only this user's and root's",
    )

    def __init__(self, uri: TransportURI, value: str) -> None:
        """``value`` is the option's. Raises `BadURI` for what names no user."""
        self._uri = uri
        self._value = value
        self._user = None
        if value and value != _ANY:
            try:
                self._user = user_number(value)
            except ValueError as error:
                raise BadURI(f"{str(uri)!r}: user={value}: {error}") from error

    def check(self, channel: AnyChannel) -> None:
        """Mark a channel as `proved <AnyChannel.proved>` where the URI says whose its far end is.

        Raises `ConnectFailed` where it is somebody else's.
        """
        found = channel.identity.user if channel.identity is not None else None
        if self._user is not None and found != self._user:
            there = f"user {found}" if found is not None else "a user whom this host does not know"
            raise ConnectFailed(
                f"{self._uri}: who listens there is {there}, and not user {self._user}, as the URI has it"
            )
        channel.proved = channel.proved or bool(self._value)

    def check_listening(self) -> None:
        """Raise `BadURI` where a destination has the option."""
        if self._value:
            raise BadURI(
                f"{str(self._uri)!r}: user= says who listens, for a source; who may connect to this side is "
                "said by --accept-from"
            )


def user_number(text: str) -> int:
    """The number of a user, given by it or by name. Raises `ValueError` with a sentence."""
    if text.isascii() and text.isdigit():
        return parse_count(text, UID)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError) as error:
        raise ValueError(f"there is no user {text!r} on this host") from error
