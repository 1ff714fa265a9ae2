"""Who is at the other end of a socket: the user, where that end is on this host.

For a Unix socket the kernel keeps it (SO_PEERCRED of unix(7)); for a TCP connection within this host it is
asked, by the connection's two ends, whose socket the other one is (sock_diag(7)). Both mean who made the
socket, or the connection, not who may have it now.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import trio

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid

# struct nlmsghdr of <linux/netlink.h>, struct inet_diag_req_v2 and inet_diag_msg of <linux/inet_diag.h>
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states; a socket's id follows
_ENDS = struct.Struct("!HH16s16s")  # the beginning of a socket's id: ports, then addresses
_NO_MORE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # the rest of it: any interface, no cookie
_REPLY = struct.Struct("=BBBB")  # family, state, timer, retransmissions; the socket's id follows
_OWNER = struct.Struct("=IIIII")  # expiry, two queues, user, inode
_SOCKET_ID_SIZE = _ENDS.size + len(_NO_MORE)
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ALL_STATES = 0xFFFFFFFF
# Of <net/tcp_states.h>. What waits in a queue to be accepted is established, or about to be; what was closed
# is in another state.
_QUEUED = (1, 3, 12)
_LISTEN = 10
_ANY_ADDRESS: dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}

Socket = socket.socket | trio.socket.SocketType


@dataclass(frozen=True)
class Peer:
    """``user`` is None where the kernel does not know it: for another host's, and for one who is gone."""

    user: int | None
    #: By a Unix socket.
    process: int | None = None
    #: By TCP; of this host where ``local`` is set.
    host: str = ""
    port: int = 0
    local: bool = True

    @property
    def trusted(self) -> bool:
        """It is this process's own user, or root, who can do all that this user can."""
        return self.user is not None and self.user in (0, os.geteuid())

    @property
    def owner(self) -> str:
        """Whose it is, for people; empty for another host's."""
        if self.process is not None:
            return f"process {self.process} of user {self.user}"
        if not self.local:
            return ""
        return f"user {self.user}" if self.user is not None else "a user not known"

    def __str__(self) -> str:
        if self.process is not None:
            return f"process {self.process} of user {self.user}"
        where = f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        if not self.local:
            return where
        return f"{where} of user {self.user}" if self.user is not None else f"{where} of a user not known"


def named(name: str, peer: Peer | None) -> str:
    """What a channel calls its other end, and whose that is: ``127.0.0.1:4444 (user 1000)``."""
    return f"{name} ({peer.owner})" if peer is not None and peer.owner else name


def peer_of(sock: Socket) -> Peer:
    """Who is at the other end of a connected TCP or Unix socket. Never waits.

    Raises `OSError` for one who has gone already.
    """
    if sock.family == socket.AF_UNIX:
        process, user, _ = _CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        return Peer(user, process=process)
    return peer_between(sock.getpeername(), sock.getsockname())


def peer_between(name: tuple[Any, ...], own_name: tuple[Any, ...]) -> Peer:
    """The same of a TCP connection, by the names of its ends. Never waits, nor raises."""
    host, port = name[:2]
    local = is_loopback(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    user = _user_of(family, name, own_name) if local else None
    return Peer(user, host=host, port=port, local=local)


def is_loopback(host: str) -> bool:
    """Whether a numeric address is reached from this host alone."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def _user_of(family: int, name: tuple[Any, ...], far_name: tuple[Any, ...]) -> int | None:
    """Of the TCP socket that is bound to ``name`` and connected to ``far_name``; None if there is none."""
    found = _ask(family, name, far_name)
    if found is None or found.state == _LISTEN or found.ports != (name[1], far_name[1]):
        return None
    if not found.inode and found.state in _QUEUED:
        # It has not been accepted yet: nobody has it but who listens there.
        found = _ask(family, name, (_ANY_ADDRESS[family], 0))
        if found is None or found.state != _LISTEN or found.ports[0] != name[1]:
            return None
    # A socket that nobody has any more is root's in the kernel's words, and has no inode.
    return found.user if found.inode else None


@dataclass(frozen=True)
class _Found:
    state: int
    ports: tuple[int, int]
    user: int
    inode: int


def _ask(family: int, name: tuple[Any, ...], far_name: tuple[Any, ...]) -> _Found | None:
    """The socket with these ends. Where there is none the kernel may name one that listens at ``name``."""
    try:
        ends = _ENDS.pack(name[1], far_name[1], _packed(family, name[0]), _packed(family, far_name[0]))
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.setblocking(False)  # the answer is there when the request has been sent
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + ends + _NO_MORE
            length = _HEADER.size + len(request)
            netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
            reply = netlink.recv(8192)
    except OSError:
        return None
    if _HEADER.unpack_from(reply)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    _, state, _, _ = _REPLY.unpack_from(reply, _HEADER.size)
    at = _HEADER.size + _REPLY.size
    source_port, far_port = _ENDS.unpack_from(reply, at)[:2]
    *_, user, inode = _OWNER.unpack_from(reply, at + _SOCKET_ID_SIZE)
    return _Found(state, (source_port, far_port), user, inode)


def _packed(family: int, host: str) -> bytes:
    return socket.inet_pton(family, host.partition("%")[0])
