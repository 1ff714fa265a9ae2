"""A tiny KVM virtual machine monitor, and a framework for migrating its guests through pluggable transports.

The public names, imported when they are first used: ``import kvmmig`` costs nothing. `docs/api.md` explains
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvmmig.api import migrate as migrate
    from kvmmig.api import open_machine as open_machine
    from kvmmig.api import receive as receive
    from kvmmig.errors import BadConfig as BadConfig
    from kvmmig.errors import BadImage as BadImage
    from kvmmig.errors import BadURI as BadURI
    from kvmmig.errors import ChannelBroken as ChannelBroken
    from kvmmig.errors import ChannelBusy as ChannelBusy
    from kvmmig.errors import ChannelClosed as ChannelClosed
    from kvmmig.errors import ConnectFailed as ConnectFailed
    from kvmmig.errors import GuestEnded as GuestEnded
    from kvmmig.errors import ImageError as ImageError
    from kvmmig.errors import KnobError as KnobError
    from kvmmig.errors import KvmError as KvmError
    from kvmmig.errors import KvmmigError as KvmmigError
    from kvmmig.errors import KvmUnavailable as KvmUnavailable
    from kvmmig.errors import KvmUnsupported as KvmUnsupported
    from kvmmig.errors import LocalStreamError as LocalStreamError
    from kvmmig.errors import MachineError as MachineError
    from kvmmig.errors import MigrationCancelled as MigrationCancelled
    from kvmmig.errors import MigrationError as MigrationError
    from kvmmig.errors import MigrationRefused as MigrationRefused
    from kvmmig.errors import OutcomeUnknown as OutcomeUnknown
    from kvmmig.errors import StateMismatch as StateMismatch
    from kvmmig.errors import StreamError as StreamError
    from kvmmig.errors import StreamTruncated as StreamTruncated
    from kvmmig.errors import StreamVersion as StreamVersion
    from kvmmig.errors import TransportError as TransportError
    from kvmmig.errors import WrongState as WrongState
    from kvmmig.machine import Ending as Ending
    from kvmmig.machine import Entry as Entry
    from kvmmig.machine import GuestMemory as GuestMemory
    from kvmmig.machine import Machine as Machine
    from kvmmig.machine import MachineConfig as MachineConfig
    from kvmmig.machine import Program as Program
    from kvmmig.machine import State as State
    from kvmmig.migration.incoming import IncomingMigration as IncomingMigration
    from kvmmig.migration.outgoing import OutgoingMigration as OutgoingMigration
    from kvmmig.migration.pagemap import PageMap as PageMap
    from kvmmig.migration.phases import Phase as Phase
    from kvmmig.migration.policy import AutoConverge as AutoConverge
    from kvmmig.migration.policy import Continue as Continue
    from kvmmig.migration.policy import Decision as Decision
    from kvmmig.migration.policy import DowntimeLimit as DowntimeLimit
    from kvmmig.migration.policy import FirstOf as FirstOf
    from kvmmig.migration.policy import GiveUp as GiveUp
    from kvmmig.migration.policy import Limits as Limits
    from kvmmig.migration.policy import MaxRounds as MaxRounds
    from kvmmig.migration.policy import NoProgress as NoProgress
    from kvmmig.migration.policy import Policy as Policy
    from kvmmig.migration.policy import RateAdaptive as RateAdaptive
    from kvmmig.migration.policy import RoundFigures as RoundFigures
    from kvmmig.migration.policy import Saving as Saving
    from kvmmig.migration.policy import Stop as Stop
    from kvmmig.migration.policy import Stopped as Stopped
    from kvmmig.migration.report import MigrationStatistics as MigrationStatistics
    from kvmmig.migration.report import TimelineEvent as TimelineEvent
    from kvmmig.migration.stall_meter import Durations as Durations
    from kvmmig.monitor.control import MachineControl as MachineControl
    from kvmmig.monitor.control import Outcome as Outcome
    from kvmmig.monitor.monitor import Monitor as Monitor
    from kvmmig.qmp import Event as Event
    from kvmmig.qmp import QMPClient as QMPClient
    from kvmmig.qmp import QMPError as QMPError
    from kvmmig.transport import Channel as Channel
    from kvmmig.transport import Knob as Knob
    from kvmmig.transport import Listener as Listener
    from kvmmig.transport import Option as Option
    from kvmmig.transport import PassingChannel as PassingChannel
    from kvmmig.transport import ReceiveChannel as ReceiveChannel
    from kvmmig.transport import SendChannel as SendChannel
    from kvmmig.transport import Side as Side
    from kvmmig.transport import Transport as Transport
    from kvmmig.transport import TransportURI as TransportURI
    from kvmmig.transport import Wrapper as Wrapper
    from kvmmig.transport import register as register
    from kvmmig.transport import register_wrapper as register_wrapper
    from kvmmig.transport import transport_for as transport_for

_NAMES = {
    "kvmmig.api": "open_machine migrate receive",
    "kvmmig.monitor.monitor": "Monitor",
    "kvmmig.monitor.control": "MachineControl Outcome",
    "kvmmig.qmp": "QMPClient Event QMPError",
    "kvmmig.machine": "Machine MachineConfig Program Entry State Ending GuestMemory",
    "kvmmig.migration.outgoing": "OutgoingMigration",
    "kvmmig.migration.incoming": "IncomingMigration",
    "kvmmig.migration.policy": "Limits Policy RoundFigures Decision Continue Stop GiveUp "
    "DowntimeLimit MaxRounds NoProgress Saving Stopped RateAdaptive AutoConverge FirstOf",
    "kvmmig.migration.phases": "Phase",
    "kvmmig.migration.report": "MigrationStatistics TimelineEvent",
    "kvmmig.migration.stall_meter": "Durations",
    "kvmmig.migration.pagemap": "PageMap",
    "kvmmig.transport": "transport_for register register_wrapper Transport TransportURI Option Listener "
    "SendChannel ReceiveChannel Channel Knob Wrapper Side PassingChannel",
    "kvmmig.errors": "KvmmigError KvmError KvmUnavailable KvmUnsupported "
    "MachineError BadConfig BadImage WrongState StateMismatch "
    "TransportError BadURI KnobError ConnectFailed ChannelBroken ChannelClosed ChannelBusy "
    "StreamError StreamTruncated StreamVersion LocalStreamError ImageError "
    "MigrationError MigrationRefused MigrationCancelled GuestEnded OutcomeUnknown",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
