"""What the built-in transports are made of, for the authors of other ones.

Channels that are ready: `SocketChannel`, `TcpChannel`, `PipeSender` and `PipeReceiver`, `ProcessSender` and
`ProcessReceiver`, `BlockFileSender` and `BlockFileReceiver`, `RandomAccessFile`; `pumped_channel` for
libraries that only have a ``send_all``, `stored_sender` and `stored_receiver` for stores, `reframed` for
wrappers that re-frame.
Listeners: `SocketListener`, `AtOnceListener`, `BundleListener`.

Parts of channels: `OneAtATime`, `prefix`, `Interrupts`, `own_tasks`, `TokenBucket`; `SendLane` and
`ReceiveLane`, threads that copy what goes through a descriptor; `Workers`, `open_in_thread` and `attempt` for
calls that may hang; `PipeWriter`, `Process` and `ProcessWatch`; `SaveFile`, `SavedFile`, `Replace` and
`REPLACE_OPTION`; `FarEnd`, the option ``user``, and `Lanes`, the option ``lanes``; `why` and `kind` for
sentences.

Each is imported when it is first used: a command that needs a socket does not wait for numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmmig.transport.toolkit import tcpsockets as tcpsockets
    from kvmmig.transport.toolkit import unixsockets as unixsockets
    from kvmmig.transport.toolkit.accessfile import RandomAccessFile as RandomAccessFile
    from kvmmig.transport.toolkit.blockfile import BlockFileReceiver as BlockFileReceiver
    from kvmmig.transport.toolkit.blockfile import BlockFileSender as BlockFileSender
    from kvmmig.transport.toolkit.buffers import prefix as prefix
    from kvmmig.transport.toolkit.bundle import BundleListener as BundleListener
    from kvmmig.transport.toolkit.bundle import Lanes as Lanes
    from kvmmig.transport.toolkit.farend import FarEnd as FarEnd
    from kvmmig.transport.toolkit.interrupts import Interrupts as Interrupts
    from kvmmig.transport.toolkit.lanes import ReceiveLane as ReceiveLane
    from kvmmig.transport.toolkit.lanes import SendLane as SendLane
    from kvmmig.transport.toolkit.listeners import AtOnceListener as AtOnceListener
    from kvmmig.transport.toolkit.one_at_a_time import OneAtATime as OneAtATime
    from kvmmig.transport.toolkit.pipes import PipeReceiver as PipeReceiver
    from kvmmig.transport.toolkit.pipes import PipeSender as PipeSender
    from kvmmig.transport.toolkit.pipes import PipeWriter as PipeWriter
    from kvmmig.transport.toolkit.process import Process as Process
    from kvmmig.transport.toolkit.process import ProcessReceiver as ProcessReceiver
    from kvmmig.transport.toolkit.process import ProcessSender as ProcessSender
    from kvmmig.transport.toolkit.process import ProcessWatch as ProcessWatch
    from kvmmig.transport.toolkit.pumped import pumped_channel as pumped_channel
    from kvmmig.transport.toolkit.pumped import pumped_receiver as pumped_receiver
    from kvmmig.transport.toolkit.pumped import pumped_sender as pumped_sender
    from kvmmig.transport.toolkit.rate import TokenBucket as TokenBucket
    from kvmmig.transport.toolkit.reframing import reframed as reframed
    from kvmmig.transport.toolkit.savefile import REPLACE_OPTION as REPLACE_OPTION
    from kvmmig.transport.toolkit.savefile import Replace as Replace
    from kvmmig.transport.toolkit.savefile import SavedFile as SavedFile
    from kvmmig.transport.toolkit.savefile import SaveFile as SaveFile
    from kvmmig.transport.toolkit.sockets import SOCKET_WORDS as SOCKET_WORDS
    from kvmmig.transport.toolkit.sockets import SocketChannel as SocketChannel
    from kvmmig.transport.toolkit.sockets import SocketListener as SocketListener
    from kvmmig.transport.toolkit.stored import in_thread as in_thread
    from kvmmig.transport.toolkit.stored import stored_receiver as stored_receiver
    from kvmmig.transport.toolkit.stored import stored_sender as stored_sender
    from kvmmig.transport.toolkit.tasks import own_tasks as own_tasks
    from kvmmig.transport.toolkit.tcpchannel import TCP_WORDS as TCP_WORDS
    from kvmmig.transport.toolkit.tcpchannel import TcpChannel as TcpChannel
    from kvmmig.transport.toolkit.tcpchannel import address as address
    from kvmmig.transport.toolkit.words import kind as kind
    from kvmmig.transport.toolkit.words import why as why
    from kvmmig.transport.toolkit.workers import Workers as Workers
    from kvmmig.transport.toolkit.workers import attempt as attempt
    from kvmmig.transport.toolkit.workers import open_in_thread as open_in_thread

_NAMES = {
    "accessfile": "RandomAccessFile",
    "blockfile": "BlockFileReceiver BlockFileSender",
    "bundle": "BundleListener Lanes",
    "farend": "FarEnd",
    "interrupts": "Interrupts",
    "lanes": "ReceiveLane SendLane",
    "listeners": "AtOnceListener",
    "one_at_a_time": "OneAtATime",
    "pipes": "PipeReceiver PipeSender PipeWriter",
    "buffers": "prefix",
    "process": "Process ProcessReceiver ProcessSender ProcessWatch",
    "pumped": "pumped_channel pumped_receiver pumped_sender",
    "rate": "TokenBucket",
    "reframing": "reframed",
    "savefile": "REPLACE_OPTION Replace SavedFile SaveFile",
    "sockets": "SOCKET_WORDS SocketChannel SocketListener",
    "stored": "in_thread stored_receiver stored_sender",
    "tasks": "own_tasks",
    "tcpchannel": "TCP_WORDS TcpChannel address",
    "words": "kind why",
    "workers": "Workers attempt open_in_thread",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["tcpsockets", "unixsockets", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in ("tcpsockets", "unixsockets"):
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
