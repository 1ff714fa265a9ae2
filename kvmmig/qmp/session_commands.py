"""The commands that need nothing but the session and the table: negotiation, what there is, descriptors."""

from __future__ import annotations

from typing import Literal

from kvmmig.qmp.messages import Arguments, NoArguments, QMPError
from kvmmig.qmp.session import Session
from kvmmig.qmp.table import CommandTable


class CapabilitiesArguments(Arguments, frozen=True):
    enable: tuple[Literal["oob"], ...] = ()


class FdArguments(Arguments, frozen=True):
    fdname: str


def add_session_commands(table: CommandTable) -> None:
    """Add them, unless ``table`` has them already: several servers may serve one table."""
    if "qmp_capabilities" in table:
        return

    async def query_commands(_session: Session, _arguments: NoArguments) -> object:
        return [{"name": name} for name in table.names()]

    table.add("qmp_capabilities", CapabilitiesArguments, _negotiate, before_negotiation=True)
    table.add("query-commands", None, query_commands)
    table.add("getfd", FdArguments, _getfd)
    table.add("closefd", FdArguments, _closefd)


async def _negotiate(session: Session, arguments: CapabilitiesArguments) -> None:
    if session.negotiated:
        raise QMPError(
            "Capabilities negotiation is already complete, command ignored", error_class="CommandNotFound"
        )
    session.out_of_band = "oob" in arguments.enable
    session.negotiated = True


async def _getfd(session: Session, arguments: FdArguments) -> None:
    session.name_fd(arguments.fdname)


async def _closefd(session: Session, arguments: FdArguments) -> None:
    session.close_fd(arguments.fdname)
