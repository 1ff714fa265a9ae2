"""Where a monitor is: ``unix:PATH``, ``tcp:HOST:PORT`` or ``fd:NUMBER``, with options behind commas.

QEMU's spellings are understood too, and mean what they mean there: ``unix:PATH,server=on,wait=off`` as behind
its ``-qmp``, ``socket,id=m,path=PATH,server=on`` as behind its ``-chardev``. One thing differs: an address
without any option listens, and waits for nobody; QEMU's connects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvmmig.errors import BadURI
from kvmmig.units import PORT

LOOPBACK = "127.0.0.1"

_LONGEST_PATH = 107  # bytes: sun_path of <sys/un.h> without its final zero
_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_FD = re.compile(r"0|[1-9][0-9]{0,9}")
_HOW = "write unix:PATH, such as unix:/tmp/a.sock, tcp:HOST:PORT, such as tcp:127.0.0.1:4444, or fd:NUMBER"
_PIECE = re.compile(r"(?:[^,]|,,)*")  # QEMU's: a comma in a value is doubled
_SWITCH = {"on": True, "yes": True, "off": False, "no": False}
_SHORT = {"server": "server=on", "wait": "wait=on", "nowait": "wait=off"}  # as QEMU took them for long
_ENDS = "server=on|off, wait=on|off"
_GUARDS = "secret-file=PATH, and insecure=on, which lets everybody in"
_OPTIONS = {
    "unix": frozenset({"server", "wait"}),
    "tcp": frozenset({"server", "wait", "secret-file", "insecure"}),
    "fd": frozenset({"server", "wait", "secret-file", "insecure"}),
}
_CHARDEV = {"unix": frozenset({"path"}), "tcp": frozenset({"host", "port"}), "fd": frozenset({"fd"})}


@dataclass(frozen=True)
class UnixAddress:
    """A socket file. The monitor listens there, or it ``connects`` to who does.

    ``waits``: a monitor that listens goes on only when its first client is there.
    """

    path: str
    connects: bool = False
    waits: bool = False

    def __str__(self) -> str:
        return f"unix:{_escaped(self.path)}{',server=off' if self.connects else ''}"


@dataclass(frozen=True)
class TcpAddress:
    """A host, by name or number, and a port; port 0 listens on any free one.

    ``secret_file`` has what both sides prove that they know. Without it a monitor serves only this user's and
    root's processes of this host, unless it ``asks_nobody``. ``connects`` and ``waits`` as a Unix socket's.
    """

    host: str
    port: int
    secret_file: str = ""
    asks_nobody: bool = False
    connects: bool = False
    waits: bool = False

    def __str__(self) -> str:
        where = f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        return where + _guard(self) + (",server=off" if self.connects else "")


@dataclass(frozen=True)
class FdAddress:
    """A socket that this process was started with, connected or listening, by its descriptor's number.

    ``secret_file`` and ``asks_nobody`` as a `TcpAddress`'s; a Unix socket needs neither.
    """

    number: int
    secret_file: str = ""
    asks_nobody: bool = False
    waits: bool = False

    def __str__(self) -> str:
        return f"fd:{self.number}{_guard(self)}"


Address = UnixAddress | TcpAddress | FdAddress


def parse_address(text: str) -> Address:
    """Raises `BadURI`."""
    kind, where, given, plain = _split(text)
    for name in given:
        if name not in _OPTIONS[kind]:
            raise BadURI(f"{text!r}: a monitor's address has no option {name!r}; {_there_are(kind)}")
    server, wait, insecure = (_switch(text, kind, given, name) for name in ("server", "wait", "insecure"))
    secret_file = given.get("secret-file", "")
    if "secret-file" in given and (not secret_file or "\0" in secret_file):
        raise BadURI(f"{text!r}: secret-file={secret_file} is not understood; {_there_are(kind)}")
    if secret_file and insecure:
        raise BadURI(f"{text!r}: with a secret it is not insecure; leave one of them out")
    connects = not plain and not server if server is None else not server
    waits = bool(server if wait is None else wait)
    if connects and waits:
        raise BadURI(f"{text!r} connects, so it waits for nobody: with wait=on goes server=on")
    match kind:
        case "unix":
            return UnixAddress(_path(text, where), connects, waits)
        case "fd":
            if not _FD.fullmatch(where):
                raise BadURI(f"{text!r} names no descriptor: {_HOW}")
            return FdAddress(int(where), secret_file, bool(insecure), waits)
    match = _TCP.fullmatch(where)
    if match is None or int(match["port"]) not in PORT:
        raise BadURI(f"{text!r} is not a monitor's address: {_HOW}")
    host = match["v6"] or match["host"] or LOOPBACK
    return TcpAddress(host, int(match["port"]), secret_file, bool(insecure), connects, waits)


def _split(text: str) -> tuple[str, str, dict[str, str], bool]:
    """The kind, the place, the options; and whether kvmmig's own rule holds, by which it listens."""
    kind, colon, rest = text.partition(":")
    if kind in _OPTIONS and colon:
        match = _PIECE.match(rest)
        assert match is not None
        given = _parse_options(text, kind, rest[match.end() :])
        return kind, match[0].replace(",,", ","), given, not {"server", "wait"} & set(given)
    if not text.startswith("socket,"):
        raise BadURI(f"{text!r} is not a monitor's address: {_HOW}")
    given = _parse_options(text, "tcp", text.removeprefix("socket"))
    given.pop("id", None)
    for kind, names in _CHARDEV.items():
        if names <= set(given):
            named = [given.pop(name) for name in sorted(names)]
            if kind == "tcp" and ":" in named[0]:
                named[0] = f"[{named[0]}]"
            return kind, ":".join(named), given, False
    raise BadURI(f"{text!r} names no socket: give path=PATH, host=HOST and port=PORT, or fd=NUMBER")


def _parse_options(text: str, kind: str, options: str) -> dict[str, str]:
    """Of ``,name=value,name=value``."""
    given: dict[str, str] = {}
    at = 0
    while at < len(options):
        match = _PIECE.match(options, at + 1)
        assert match is not None
        name, equals, value = _SHORT.get(match[0], match[0]).partition("=")
        if not equals:
            raise BadURI(f"{text!r}: behind a comma come options, as in ,server=on; {_there_are(kind)}")
        if name in given:
            raise BadURI(f"{text!r} gives {name!r} twice; give it once")
        given[name] = value.replace(",,", ",")
        at = match.end()
    return given


def _switch(text: str, kind: str, given: Mapping[str, str], name: str) -> bool | None:
    if name not in given:
        return None
    if given[name] not in _SWITCH:
        raise BadURI(f"{text!r}: {name}={given[name]} is not understood; {_there_are(kind)}")
    return _SWITCH[given[name]]


def _there_are(kind: str) -> str:
    return f"there are {_ENDS}" if kind == "unix" else f"there are {_ENDS}, {_GUARDS}"


def _path(text: str, path: str) -> str:
    if not path or "\0" in path:
        raise BadURI(f"{text!r} names no socket: {_HOW}")
    if (length := len(os.fsencode(path))) > _LONGEST_PATH:
        raise BadURI(
            f"{text!r}: the path has {length} bytes, and a socket's may have {_LONGEST_PATH}; "
            "choose a shorter one"
        )
    return path


def _guard(address: TcpAddress | FdAddress) -> str:
    if address.secret_file:
        return f",secret-file={_escaped(address.secret_file)}"
    return ",insecure=on" if address.asks_nobody else ""


def _escaped(path: str) -> str:
    return path.replace(",", ",,")
