"""The figures of a migration, spelled as QEMU spells them; and those that only kvmmig has."""

from __future__ import annotations

import math
from typing import Any

from kvmmig.machine import PAGE_SIZE
from kvmmig.migration.phases import Phase
from kvmmig.migration.report import MigrationStatistics
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.figures import figures_reply, kebab
from kvmmig.monitor.incoming import Incoming
from kvmmig.monitor.states import SWITCHING_OVER, MigrationStatus
from kvmmig.monitor.targets import socket_address
from kvmmig.transport import TransportURI


def migration_info(control: MachineControl) -> dict[str, Any]:
    """``query-migrate``'s reply, QEMU's ``MigrationInfo``: empty before there was any migration."""
    status, migration = control.outgoing.status, control.outgoing.migration
    if migration is not None and status is not None:
        return _outgoing(status, migration.statistics(), control.outgoing.error)
    if control.incoming.uri is not None:
        return _incoming(control.incoming, control.incoming.uri)
    return {}


def _outgoing(status: MigrationStatus, figures: MigrationStatistics, error: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "status": status,
        "total-time": _ms(figures.total_time),
        "ram": _ram(figures),
        "cpu-throttle-percentage": round(figures.throttle * 100),
    }
    if figures.setup_time is not None:
        info["setup-time"] = _ms(figures.setup_time)
    if figures.downtime is not None:
        info["downtime"] = _ms(figures.downtime)
    if figures.expected_downtime is not None and math.isfinite(figures.expected_downtime):
        info["expected-downtime"] = _ms(figures.expected_downtime)
    if error or figures.error:
        info["error-desc"] = error or figures.error
    return info


def _ram(figures: MigrationStatistics) -> dict[str, Any]:
    """QEMU's ``MigrationRAMStats``; what has no meaning here is zero, as it is there for such a migration."""
    rounds = figures.rounds
    last = rounds[-1] if rounds else None
    sends = figures.sent_pages + figures.zero_pages
    begun = sends or figures.phase not in (Phase.SETUP, Phase.ROUNDS)  # all of it is pending until then
    switching = figures.phase in SWITCHING_OVER or figures.phase in (Phase.DONE, Phase.UNKNOWN)
    before = sum(one.sent_bytes for one in rounds) if switching else figures.sent_bytes
    dirty_rate = figures.dirty_rate / PAGE_SIZE
    return {
        "transferred": figures.sent_bytes,
        "remaining": (figures.remaining_pages if begun else figures.total_pages) * PAGE_SIZE,
        "total": figures.total_pages * PAGE_SIZE,
        "duplicate": figures.zero_pages,
        "normal": figures.sent_pages,
        "normal-bytes": figures.sent_pages * PAGE_SIZE,
        "dirty-pages-rate": round(dirty_rate),
        "mbps": figures.rate * 8 / 1e6,
        "dirty-sync-count": 0 if figures.setup_time is None else len(rounds) + 1 + switching,
        "postcopy-requests": 0,
        "page-size": PAGE_SIZE,
        "multifd-bytes": 0,
        "pages-per-second": round(
            (last.sent_pages + last.zero_pages) / last.duration
            if last is not None and last.duration
            else sends / max(figures.total_time - (figures.setup_time or 0.0), 1e-3)
        ),
        "precopy-bytes": before,
        "downtime-bytes": figures.sent_bytes - before,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }


def _incoming(incoming: Incoming, uri: TransportURI) -> dict[str, Any]:
    info: dict[str, Any] = {"status": incoming.status}
    address = socket_address(uri)
    if incoming.status == "setup" and address is not None:
        info["socket-address"] = address
    if incoming.error and incoming.status != "completed":
        info["error-desc"] = incoming.error
    if incoming.peer:
        info["x-kvmmig-peer"] = incoming.peer
    return info


def migration_figures(control: MachineControl) -> dict[str, Any]:
    """`figures_reply` of the present or last migration; empty before there was any."""
    migration = control.outgoing.migration
    if migration is None:
        return {}
    return figures_reply(migration.statistics(), control.outgoing.status)


def page_map(control: MachineControl, blocks: int) -> dict[str, Any] | None:
    """`PageMap` of the present or last migration; None before there was any."""
    migration = control.outgoing.migration
    if migration is None:
        return None
    reply: dict[str, Any] = kebab(migration.page_map(blocks))
    return reply


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
