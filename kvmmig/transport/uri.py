"""``[wrapper+...]scheme:target[?option=value&...]``: where a guest goes, as an object and as text.

A URI is an object first. Who has a path, a command or a name builds one, ``TransportURI("file", path)``, and
never glues text together. As text it can be read back whole::

    in a target       all characters stand for themselves, but %3F for ? and %25 for %
    in a value        %XX is the byte XX of UTF-8, as in any URL: %26 for &, %3F for ?, %25 for %

``%3F`` is needed only where what follows the ``?`` looks like options, and ``%25`` only before ``3F`` or
``25``: so most paths and commands need neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from kvmmig.errors import BadURI

_NAME = re.compile(r"[a-z][a-z0-9.-]*")
_OPTION = re.compile(r"[a-z][a-z0-9._-]*")
_OPTIONS = re.compile(rf"{_OPTION.pattern}=[^&?]*(&{_OPTION.pattern}=[^&?]*)*")
_ESCAPED = re.compile(r"%(3F|25)", re.IGNORECASE)
_SPECIAL = re.compile(r"[%&?]")  # in a value


@dataclass(frozen=True, slots=True)
class TransportURI:
    """A scheme, its target, its options, and the names of the wrappers around it, the outermost first.

    The target's own grammar belongs to the transport. A wrapper's options have its name before them:
    ``throttle+tcp:127.0.0.1:4444?throttle.rate=50MB/s``. Raises `BadURI` for names that can't be.

    >>> print(kvmmig.TransportURI("file", "/srv/what?direct=off"))
    file:/srv/what%3Fdirect=off
    """

    scheme: str
    target: str
    options: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.wrappers, self.scheme):
            if not _NAME.fullmatch(name):
                raise BadURI(f"{name!r} is no name for a transport: use letters a to z, digits, . and -")
        for name in self.options:
            if not _OPTION.fullmatch(name):
                raise BadURI(f"{name!r} is no name for an option: use letters a to z, digits, . _ and -")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take ``text`` apart; `BadURI` says what a URI looks like when it can't."""
        head, colon, target = text.partition(":")
        *wrappers, scheme = head.split("+")
        if not colon or not all(_NAME.fullmatch(name) for name in (*wrappers, scheme)):
            raise BadURI(
                f"{text!r} is not a transport URI: write scheme:target, such as tcp:127.0.0.1:4444 or "
                "file:/var/tmp/guest.img"
            )
        options: dict[str, str] = {}
        before, mark, after = target.rpartition("?")
        if mark and _OPTIONS.fullmatch(after):
            target = before
            for option in after.split("&"):
                name, _, value = option.partition("=")
                if name in options:
                    raise BadURI(f"{text!r} gives the option {name!r} twice; give it once")
                options[name] = unquote(value, errors="surrogateescape")
        return cls(scheme, _unescaped(target), options, tuple(wrappers))

    def unwrapped(self) -> tuple[dict[str, str], TransportURI]:
        """The outermost wrapper's options, under their own names, and what it wraps."""
        own, rest = {}, {}
        for name, value in self.options.items():
            wrapper, dot, option = name.partition(".")
            if dot and wrapper == self.wrappers[0]:
                own[option] = value
            else:
                rest[name] = value
        return own, TransportURI(self.scheme, self.target, rest, self.wrappers[1:])

    def __str__(self) -> str:
        head = "+".join((*self.wrappers, self.scheme))
        target = _ESCAPED.sub(lambda escape: "%25" + escape[1], self.target)
        if self.options:
            options = "&".join(f"{name}={_quoted(value)}" for name, value in self.options.items())
            return f"{head}:{target}?{options}"
        while _OPTIONS.fullmatch(target.rpartition("?")[2]) and "?" in target:
            target = "%3F".join(target.rsplit("?", 1))
        return f"{head}:{target}"


def _unescaped(target: str) -> str:
    return _ESCAPED.sub(lambda escape: "?" if escape[1].upper() == "3F" else "%", target)


def _quoted(value: str) -> str:
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", value)
