"""Where a migration leads, as a QMP client says it: a URI, or QEMU's ``channels``; ``fd:NAME`` resolved."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
import trio

from kvmmig.qmp import QMPError, Session
from kvmmig.transport import Transport, TransportURI, descriptors, transport_for
from kvmmig.transport.places import check_place
from kvmmig.transport.registry import target_is_path

_NO_OFFSET = "{where}: a saved guest begins at the beginning of its file here; leave the offset out"


class _Address(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """QEMU's ``MigrationAddress``: which fields there are depends on ``transport`` and ``type``."""

    transport: Literal["socket", "exec", "file"]
    type: Literal["inet", "unix", "fd", ""] = ""
    host: str = ""
    port: str = ""
    path: str = ""
    str_: str = msgspec.field(default="", name="str")
    args: list[str] = []
    filename: str = ""
    offset: int = 0

    def uri(self) -> TransportURI:
        """Raises `QMPError` for an address that there can't be."""
        match self.transport, self.type:
            case "socket", "inet":
                host = f"[{self.host}]" if ":" in self.host else self.host
                return TransportURI("tcp", f"{host}:{self.port}")
            case "socket", "unix":
                return TransportURI("unix", self.path)
            case "socket", "fd":
                return TransportURI("fd", self.str_)
            case "exec", "":
                return TransportURI("exec", shlex.join(self.args))
            case "file", "":
                if self.offset:
                    raise QMPError(_NO_OFFSET.format(where=self.filename))
                return TransportURI("file", self.filename)
        raise QMPError(
            f"channels: an address of transport {self.transport!r} and type {self.type!r} is unknown"
        )


class Channel(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """QEMU's ``MigrationChannel``; only the main one exists here."""

    channel_type: Literal["main"]
    addr: _Address


Channels = Annotated[list[Channel], msgspec.Meta(min_length=1, max_length=1)]


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
    session: Session, uri: str | None, channels: list[Channel] | None, *, may_exec: bool
) -> Target:
    """What ``uri``, or ``channels``, means for this client. Raises `QMPError`, `BadURI`, `TransportError`.

    Unless it ``may_exec`` its target starts no program.
    """
    target = await _find_any_target(session, uri, channels)
    if target.transport.starts_programs and not may_exec:
        raise QMPError(
            f"{target.transport.uri} would start a program, and this machine was told (--no-exec) that its "
            "clients may start none"
        )
    return target


async def _find_any_target(session: Session, uri: str | None, channels: list[Channel] | None) -> Target:
    if (uri is None) == (channels is None):
        raise QMPError("give either 'uri' or 'channels', and not both")
    if uri is not None:
        parsed = TransportURI.parse(uri)
        if parsed.scheme == "file" and ",offset=" in parsed.target:
            raise QMPError(_NO_OFFSET.format(where=uri))
    else:
        assert channels is not None
        parsed = channels[0].addr.uri()
    # These import modules, and look for packages that bring more of them: 20 ms, the first time.
    if await trio.to_thread.run_sync(target_is_path, parsed.scheme):
        await trio.to_thread.run_sync(check_place, parsed.target)
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
