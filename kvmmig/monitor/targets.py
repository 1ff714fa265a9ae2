"""Where a migration leads, as a QMP client says it: a URI, or QEMU's ``channels``; ``fd:NAME`` resolved."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import trio
from msgspec import UNSET, UnsetType

from kvmmig.qmp import QMPError, Session
from kvmmig.transport import Transport, TransportURI, descriptors, transport_for
from kvmmig.transport.places import check_place, check_writable
from kvmmig.transport.registry import target_is_path

_ADDRESS = "channels[0].addr"
_NO_OFFSET = "{where}: a saved guest begins at the beginning of its file here; leave the offset out"


class _Address(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """QEMU's ``MigrationAddress``: which fields there are depends on ``transport`` and ``type``."""

    transport: Literal["socket", "exec", "rdma", "file"]
    type: Literal["inet", "unix", "vsock", "fd"] | UnsetType = UNSET
    host: str | UnsetType = UNSET
    port: str | UnsetType = UNSET
    path: str | UnsetType = UNSET
    str_: str | UnsetType = msgspec.field(default=UNSET, name="str")
    args: list[str] | UnsetType = UNSET
    filename: str | UnsetType = UNSET
    offset: int | UnsetType = UNSET

    def uri(self) -> TransportURI:
        """Raises `QMPError` for an address that there can't be, as QEMU does."""
        match self.transport:
            case "exec":
                (args,) = self._only("args")
                return TransportURI("exec", shlex.join(args))
            case "file":
                filename, offset = self._only("filename", "offset")
                if offset:
                    raise QMPError(_NO_OFFSET.format(where=filename))
                return TransportURI("file", filename)
            case "rdma":
                raise QMPError("there is no RDMA here; use a socket")
        match self.type:
            case "inet":
                _, host, port = self._only("type", "host", "port")
                return TransportURI("tcp", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            case "unix":
                return TransportURI("unix", self._only("type", "path")[1])
            case "fd":
                return TransportURI("fd", self._only("type", "str")[1])
            case "vsock":
                raise QMPError("there are no vsock sockets here; use inet, unix or fd")
        self._only("type")
        raise AssertionError("there is no such address")

    def _only(self, *names: str) -> list[Any]:
        """The fields of an address that has these and no others."""
        given = msgspec.structs.asdict(self)
        given["str"] = given.pop("str_")
        for name in names:
            if given[name] is UNSET:
                raise QMPError(f"Parameter '{_ADDRESS}.{name}' is missing")
        for name, value in given.items():
            if name not in ("transport", *names) and value is not UNSET:
                raise QMPError(f"Parameter '{_ADDRESS}.{name}' is unexpected")
        return [given[name] for name in names]


class Channel(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """QEMU's ``MigrationChannel``; only the main one exists here."""

    channel_type: Literal["main", "cpr"]
    addr: _Address


Channels = list[Channel]


@dataclass(frozen=True, slots=True)
class Target:
    """A transport, and the name of the descriptor that it will take over, if the client has passed it."""

    transport: Transport
    name: str = ""
    given: str = ""  # what the process calls it: another client may have used the same name

    def take(self, session: Session) -> None:
        """The transport is going to be used: the descriptor is the session's no more."""
        if self.given:
            session.fds.pop(self.name, None)

    def done(self) -> None:
        """The transport will be used no more: close the descriptor if it never came to take it over."""
        descriptors.withdraw(self.given)

    def leave(self, session: Session) -> None:
        """The transport won't be used: the descriptor stays the session's, unless it has been taken."""
        if not descriptors.forget(self.given):
            self.take(session)


async def find_target(
    session: Session,
    uri: str | UnsetType,
    channels: Channels | UnsetType,
    *,
    may_exec: bool,
    writing: bool,
) -> Target:
    """What ``uri``, or ``channels``, means for this client. Raises `QMPError`, `BadURI`, `TransportError`.

    Unless it ``may_exec`` its target starts no program. ``writing``: a guest is to be saved there, and a file
    that can't be made is an error already.
    """
    target = await _find_any_target(session, uri, channels, writing)
    if target.transport.starts_programs and not may_exec:
        raise QMPError(
            f"{target.transport.uri} would start a program, and this machine was told (--no-exec) that its "
            "clients may start none"
        )
    return target


async def _find_any_target(
    session: Session, uri: str | UnsetType, channels: Channels | UnsetType, writing: bool
) -> Target:
    if uri is not UNSET and not channels:
        parsed = TransportURI.parse(uri)
        if parsed.scheme == "file" and ",offset=" in parsed.target:
            raise QMPError(_NO_OFFSET.format(where=uri))
    elif channels and uri is UNSET:
        if len(channels) > 1 or channels[0].channel_type != "main":
            raise QMPError("Channel list must have one main channel, and can have no others here")
        parsed = channels[0].addr.uri()
    else:
        raise QMPError("need either 'uri' or 'channels' argument")
    # These import modules, and look for packages that bring more of them: 20 ms, the first time.
    if await trio.to_thread.run_sync(target_is_path, parsed.scheme):
        await trio.to_thread.run_sync(check_place, parsed.target)
        if writing:
            await trio.to_thread.run_sync(check_writable, parsed.target)
    name = given = ""
    if parsed.scheme == "fd":
        name = parsed.target
        if name in session.fds:
            given = descriptors.give(name, session.fds[name])
            parsed = replace(parsed, target=given)
        elif descriptors.number_of(name) is None:
            raise QMPError(f"File descriptor named '{name}' has not been found; pass it with 'getfd' first")
        else:
            descriptors.check_named(name)
    try:
        return Target(await trio.to_thread.run_sync(transport_for, parsed), name, given)
    except BaseException:
        descriptors.forget(given)
        raise


def socket_address(uri: TransportURI) -> list[dict[str, str]] | None:
    """Where somebody listens, as QEMU's ``socket-address``; None where that is no socket."""
    match uri.scheme:
        case "tcp":
            host, _, port = uri.target.rpartition(":")
            return [{"type": "inet", "host": host.strip("[]"), "port": port}]
        case "unix":
            return [{"type": "unix", "path": uri.target}]
    return None
