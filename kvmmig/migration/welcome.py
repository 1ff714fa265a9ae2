"""Who may send a guest here, which guests may come, and who is never given one.

An address is no identity, and a loopback address is none either: every user of a host can listen on, and
connect to, its ports. So a user of this host who is neither this one nor root is a stranger, on both sides,
unless the channel has proved who is there (`AnyChannel.proved`) or the operator has said otherwise.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from kvmmig.errors import ConnectFailed, MigrationError, StateMismatch
from kvmmig.machine.config import MachineDescription
from kvmmig.transport import AnyChannel
from kvmmig.transport.peers import Peer, named
from kvmmig.transport.toolkit.farend import user_number
from kvmmig.units import CPUS, MEMORY, write_size

_HOW = "write an address, a network such as 192.0.2.0/24, user:NAME, or any"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where sources may come from: an address or a network, a user of this host, or anywhere. See `parse`."""

    text: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    user: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``192.0.2.7``, ``2001:db8::/32``, ``user:alice``, ``user:1000``, ``any``. Raises `ValueError`."""
        if text == "any":
            return cls(text)
        kind, colon, name = text.partition(":")
        if kind == "user" and colon and name:
            return cls(text, user=user_number(name))
        try:
            return cls(text, network=ipaddress.ip_network(text))
        except ValueError as error:
            hint = _HOW
            if "host bits" in str(error):
                hint = f"it names one host of a network; write {ipaddress.ip_network(text, strict=False)}"
            raise ValueError(f"{text!r} is no origin of guests: {hint}") from error

    def includes(self, peer: Peer | None) -> bool:
        """Whether ``peer`` is one of them. Who is not known is nowhere, except in ``any``."""
        if self.user is None and self.network is None:
            return True
        if peer is None:
            return False
        if self.network is None:
            return peer.user is not None and peer.user == self.user
        return bool(peer.host) and _address(peer.host) in self.network

    def __str__(self) -> str:
        return self.text


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What a destination takes in. Each bound may be left open by None."""

    #: Bytes of a guest's memory.
    max_memory: int | None = None
    #: vCPUs of a guest.
    max_cpus: int | None = None
    #: Sources come from one of these; None is this host's trusted users, and all other hosts.
    accept_from: tuple[Origin, ...] | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for what can be no bound."""
        if self.max_memory is not None:
            MEMORY.check_whole(self.max_memory, "the most memory of a guest that comes")
        if self.max_cpus is not None:
            CPUS.check_whole(self.max_cpus, "the most vCPUs of a guest that comes")

    @classmethod
    def of(cls, *, max_memory: int | None, max_cpus: int | None, accept_from: Iterable[str]) -> Self:
        """With the texts of origins; none of them is None. Raises `ValueError`."""
        origins = tuple(Origin.parse(text) for text in accept_from)
        return cls(max_memory=max_memory, max_cpus=max_cpus, accept_from=origins or None)

    def narrowed(self, other: Welcome) -> Welcome:
        """What is welcome by both. Raises `ValueError` where both say from where."""
        if self.accept_from is not None and other.accept_from is not None:
            raise ValueError(
                f"this machine was told from where guests may come ({_listed(self.accept_from)}), and that "
                "stays so"
            )
        return replace(
            self,
            max_memory=_least(self.max_memory, other.max_memory),
            max_cpus=_least(self.max_cpus, other.max_cpus),
            accept_from=self.accept_from if self.accept_from is not None else other.accept_from,
        )

    @property
    def includes_others(self) -> bool:
        """Whether another user of this host may be a source."""
        origins = self.accept_from or ()
        return any(origin.user not in (None, 0, os.geteuid()) or origin.text == "any" for origin in origins)

    def check_source(self, channel: AnyChannel) -> None:
        """Raise `MigrationError` for a source that is not welcome, whatever it sends."""
        peer = channel.identity
        if self.accept_from is None:
            if peer is not None and is_stranger(channel):
                raise MigrationError(
                    f"this destination takes guests from its own user and root, and you are {peer.owner}; "
                    "--accept-from user:NAME lets another user in"
                )
        elif not any(origin.includes(peer) for origin in self.accept_from):
            raise MigrationError(
                f"this destination takes guests from {_listed(self.accept_from)}, and you are "
                f"{peer if peer is not None else 'somebody whom this transport does not name'}"
            )

    def check_guest(self, description: MachineDescription) -> None:
        """Raise `StateMismatch` for a guest that is larger than was allowed."""
        if self.max_memory is not None and description.memory > self.max_memory:
            raise StateMismatch(
                f"the guest has {write_size(description.memory)} of memory, and this destination takes "
                f"{write_size(self.max_memory)} at most (--max-memory)"
            )
        if self.max_cpus is not None and description.cpus > self.max_cpus:
            raise StateMismatch(
                f"the guest has {description.cpus} vCPUs, and this destination takes {self.max_cpus} at most "
                "(--max-cpus)"
            )


def check_destination(channel: AnyChannel) -> None:
    """Raise `ConnectFailed` where another user of this host listens: it would get all that the guest has."""
    if is_stranger(channel):
        raise ConnectFailed(
            f"{named(channel.peer, channel.identity)} listens there, and is neither this user nor root, so "
            "no guest goes there; write ?user=NAME behind the address if that is right, or use secret+ or "
            "tls+"
        )


def is_stranger(channel: AnyChannel) -> bool:
    """At the other end is a user of this host who is neither this one nor root, and has proved nothing."""
    peer = channel.identity
    return peer is not None and peer.local and not peer.trusted and not channel.proved


def _listed(origins: tuple[Origin, ...]) -> str:
    return ", ".join(map(str, origins))


def _least(one: int | None, other: int | None) -> int | None:
    given = [bound for bound in (one, other) if bound is not None]
    return min(given, default=None)
