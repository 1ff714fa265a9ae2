"""Who may be a client of a monitor, and how many: so that nobody gets in, and nobody keeps others out.

Whoever may open the Unix socket is the monitor's owner, and always finds room there: TCP gets only a part of
it, and one stranger (a user of this host, or another host) only a part of that.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvmmig.qmp.address import Address, UnixAddress
from kvmmig.transport.boundedlog import BoundedLog
from kvmmig.transport.peers import Peer

_log = logging.getLogger("kvmmig.qmp")

_MOST = 64  # clients
_MOST_BY_TCP = 48  # the others are for Unix sockets
_MOST_OF_A_STRANGER = 16
_SITE = 64  # bits: a host may have all IPv6 addresses that begin alike


class Refused(Exception):
    """The text is for the client."""


class Admission:
    """The clients of all addresses of one server."""

    def __init__(self) -> None:
        self._present: Counter[str] = Counter()
        self._by_tcp = 0
        self._log = BoundedLog(_log)

    @contextmanager
    def admit(self, peer: Peer, address: Address) -> Iterator[None]:
        """Count it as a client for the block. Raises `Refused`, and says so in the log.

        Where a secret is asked for it has not been proved yet.
        """
        whose = _whose(peer)
        try:
            self._check(peer, address, whose)
        except Refused as refusal:
            self._log.warn(f"{peer} was refused at the monitor {address}: {refusal}")
            raise
        if peer.trusted:
            _log.info("%s is a client of the monitor at %s", peer, address)
        else:
            self._log.warn(f"{peer} is connected to the monitor at {address}")
        by_tcp = peer.process is None
        self._present[whose] += 1
        self._by_tcp += by_tcp
        try:
            yield
        finally:
            self._by_tcp -= by_tcp
            self._present[whose] -= 1
            if not self._present[whose]:
                del self._present[whose]

    def warn(self, peer: Peer, text: str) -> None:
        """Say in the log what a client has tried."""
        self._log.warn(f"{peer} {text}")

    def check(self, peer: Peer, address: Address) -> None:
        """Raise `Refused` for one who would not be admitted now."""
        self._check(peer, address, _whose(peer))

    def _check(self, peer: Peer, address: Address, whose: str) -> None:
        if peer.process is None:
            guarded = not isinstance(address, UnixAddress) and (address.asks_nobody or address.secret_file)
            if not (peer.trusted or guarded):
                raise Refused(f"this monitor is for its own user and root, and you are {_described(peer)}")
            if not peer.trusted and self._present[whose] >= _MOST_OF_A_STRANGER:
                raise Refused(
                    f"{_MOST_OF_A_STRANGER} clients of {whose} are connected already, and no more may be"
                )
            if self._by_tcp >= _MOST_BY_TCP:
                raise Refused(f"{_MOST_BY_TCP} clients are connected by TCP already, and no more may be")
        elif not peer.trusted:
            raise Refused(f"this monitor is for its own user and root, and you are {_described(peer)}")
        if self._present.total() >= _MOST:
            raise Refused(f"{_MOST} clients are connected already, and no more may be")


def _whose(peer: Peer) -> str:
    """By whom clients are counted: by user where the kernel knows it, else by host."""
    if peer.user is not None:
        return f"user {peer.user}"
    if peer.local:
        return "this host"
    address = ipaddress.ip_address(peer.host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address) >> _SITE << _SITE, 128 - _SITE)))
    return peer.host


def _described(peer: Peer) -> str:
    return f"user {peer.user}" if peer.user is not None else "somebody whom the kernel does not name"
