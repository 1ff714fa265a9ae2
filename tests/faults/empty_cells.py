"""Which cells can't exist, and why; and which need more than this host gives."""

from __future__ import annotations

from kvmmig.errors import BadURI
from kvmmig.transport.registry import transport_for
from tests.faults.host import Host
from tests.faults.matrix import OF_A_PEER, Cell, Fault, Moment, Verdict

_NO_HELPER = "{transport} has no helper process"
_NO_DISK = "the other side of {transport} keeps the guest in memory: no disk is on the way"
_STARTED = "it has started by then"
_ONE_WORD = "all that is left to send is one word: no sink is too slow for it"
_TINY = "there are only the few hundred bytes of the hello to send: no sink is too slow for them"

_SOCKETS: dict[Fault, str] = {
    Fault.HELPER_KILLED: _NO_HELPER,
    Fault.HELPER_STOPPED: _NO_HELPER,
    Fault.DISK_FULL: _NO_DISK,
    Fault.WRITE_ERROR: _NO_DISK,
    Fault.FROZEN: _NO_DISK,
}
_FILES: dict[Fault, str] = {
    Fault.LINK_CUT: "a file on this host is reached over no link",
    Fault.PEER_KILLED: "nobody reads a file while it is being written: there is no peer",
    Fault.PEER_STOPPED: "nobody reads a file while it is being written: there is no peer",
}

#: Where the fault can't exist at any moment.
_NEVER: dict[str, dict[Fault, str]] = {
    "tcp": _SOCKETS,
    "unix": {**_SOCKETS, Fault.LINK_CUT: "a Unix socket never leaves the host: there is no link to cut"},
    "pipe": _FILES,
    "file": {
        **_FILES,
        Fault.HELPER_KILLED: _NO_HELPER,
        Fault.HELPER_STOPPED: _NO_HELPER,
        Fault.SLOW_START: "a file has nothing to start; a slow disk at the open is the frozen one",
    },
    "exec": {
        Fault.LINK_CUT: "the command's pipe is no link; a link behind it fails as its process does",
    },
}

#: Those that only store the guest. A command does where it is not one that is a kvmmig itself.
_STORES = "it only stores the guest: the guest stays the source's until all of it is safe"

_EARLY = (Moment.CONNECT, Moment.HELLO)


def why_not(cell: Cell, host: Host) -> tuple[Verdict, str] | None:
    """Why there is nothing to see in a cell; None if there is."""
    reason = _NEVER[cell.transport].get(cell.fault, "") or _not_then(cell)
    if reason:
        return Verdict.IMPOSSIBLE, reason.format(transport=cell.transport)
    if reason := _not_here(cell, host):
        return Verdict.UNAVAILABLE, reason
    return None


def _not_then(cell: Cell) -> str:
    if cell.moment is Moment.HANDED_OVER and (
        cell.transport in ("pipe", "file") or (cell.transport == "exec" and cell.fault not in OF_A_PEER)
    ):
        return _STORES
    match cell.fault:
        case Fault.SLOW_SINK if cell.moment is Moment.HANDED_OVER:
            return _ONE_WORD
        case Fault.SLOW_SINK if cell.moment in _EARLY:
            return _TINY
        case Fault.SLOW_START if cell.transport in ("tcp", "unix"):
            return "" if cell.moment in _EARLY else _STARTED
        case Fault.SLOW_START:
            if cell.moment in _EARLY:
                return "the pipe to the process is there, and takes the hello, before the process gets going"
            return "" if cell.moment is Moment.FIRST else _STARTED
        case Fault.NOT_WRITABLE if cell.moment is not Moment.CONNECT:
            if cell.transport in ("tcp", "unix"):
                return "what is connected stays writable until its peer ends: see peer killed"
            if cell.transport == "exec":
                return "the shell has opened the command's target by then, and open it stays writable"
    return ""


def _not_here(cell: Cell, host: Host) -> str:
    try:
        transport_for(f"{cell.transport}:/dev/null" if cell.transport != "tcp" else "tcp:127.0.0.1:1")
    except BadURI:
        return "not there yet"
    if cell.transport == "tcp":
        return host.why_no_cable if cell.fault is Fault.LINK_CUT else ""
    if cell.transport in ("pipe", "file", "exec"):
        throttle = host.why_no_throttle if cell.fault is Fault.SLOW_SINK else ""
        return host.why_no_disk or throttle
    return ""
