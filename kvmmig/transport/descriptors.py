"""Which descriptors of this process ``fd:`` may name: those that somebody meant, and never one of its own.

A number is only a number: the one that a person means may be, by now, the event loop's. So a process that
serves others, as ``kvmmig run`` does, lets be named only what it was given: by `give`, under a name, or by
`inherit`, which takes a number's descriptor away from where it is before anything else can get that number.
A program of somebody else's that uses the Python API may name its own numbers, except those in use.

It imports little: the command line looks in here before it forks.
"""

from __future__ import annotations

import fcntl
import gc
import os
import re
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass, field

from kvmmig.errors import BadURI, ConnectFailed

_STANDARD = 3  # below it are those that every process expects to be open
_NUMBER = re.compile(r"0|[1-9][0-9]{0,99}")
_LIKE_A_NUMBER = re.compile(r"[+-]?\d", re.UNICODE)
_LISTED = re.compile(rb"^tfd:\s*(\d+)", re.MULTILINE)  # in the fdinfo of an epoll instance


@dataclass(slots=True)
class _Table:
    given: dict[str, int] = field(default_factory=dict)
    closed: bool = False


_table = _Table()


def number_of(target: str) -> int | None:
    """The number that ``fd:TARGET`` means, or None for a name.

    Raises `BadURI` for what looks like a number and is none: -1, +5, 00005, or digits of another script.
    """
    if _NUMBER.fullmatch(target):
        return int(target)
    if not target or _LIKE_A_NUMBER.match(target):
        raise BadURI(
            f"fd:{target} names no descriptor: write its number with the digits 0 to 9 and nothing before "
            "them, such as fd:5"
        )
    return None


def give(name: str, fd: int) -> str:
    """Let a name mean ``fd``, which is this table's from here on; returns the name that it got.

    That is ``name`` itself where it is free, else one like it. Raises `BadURI` for one like a number.
    """
    if number_of(name) is not None:
        raise BadURI(f"{name!r} is a number, and no name for a descriptor")
    free, count = name, 1
    while free in _table.given:
        count += 1
        free = f"{name}.{count}"
    _table.given[free] = fd
    return free


def withdraw(name: str) -> None:
    """Close what `give` was given, unless somebody has taken it over."""
    fd = _table.given.pop(name, None)
    if fd is not None:
        os.close(fd)


def only_given() -> None:
    """From here on a number means only what this process has inherited on purpose: see `inherit`."""
    _table.closed = True


def inherit(number: int) -> None:
    """Let ``fd:NUMBER`` mean what this process was started with at that number, whatever gets it later.

    The descriptor moves: 0, 1 and 2 lead to /dev/null then. Raises `BadURI` for one that is not open, or
    that is not from outside.
    """
    if str(number) in _table.given:
        return
    check_inherited(number)
    moved = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _STANDARD)
    let_go(number)
    _table.given[str(number)] = moved


def check_inherited(number: int) -> None:
    """Raise `BadURI` unless this process was started with that descriptor."""
    try:
        inherited = os.get_inheritable(number)
    except (OSError, OverflowError) as error:
        raise BadURI(
            f"fd:{number}: this command was started without a descriptor {number}; a shell passes one with, "
            f"for example, {number}<pipe or {number}>pipe behind the command"
        ) from error
    # Python and kvmmig open whatever they open with close-on-exec; what came through an exec is without it.
    if not inherited:
        raise BadURI(f"fd:{number}: descriptor {number} is one of kvmmig's own, and none that it was passed")


def check_named(target: str) -> None:
    """Raise `BadURI` unless ``fd:TARGET`` is a number that this process has inherited on purpose.

    For who speaks in another process's place, as a monitor's client does: nothing else is theirs to name.
    """
    number = number_of(target)
    if number is None or str(number) not in _table.given:
        raise BadURI(
            f"fd:{target}: this process was passed no such descriptor; a monitor's client passes one with "
            "'getfd' and uses its name, and kvmmig run inherits one with --pass-fd"
        )


def forget(target: str) -> bool:
    """``fd:TARGET`` means nothing any more; whether it did. Its descriptor is the caller's."""
    return _table.given.pop(target, None) is not None


def find(target: str) -> int:
    """The descriptor that ``fd:TARGET`` means, which may be below 3. Who takes it over calls `forget`.

    Raises `BadURI`, and `ConnectFailed` for one that is not there, or in use by this process itself.
    """
    number = number_of(target)
    fd = _table.given.get(target)
    if fd is not None:
        return fd
    if number is None:
        raise ConnectFailed(f"fd:{target}: no descriptor has that name; pass one with it, or its number")
    if _table.closed:
        raise ConnectFailed(
            f"fd:{target}: this process was not passed descriptor {number}, or it has been used already; "
            "pass one with --pass-fd, or with a monitor's 'getfd'"
        )
    try:
        os.fstat(number)
    except (OSError, OverflowError) as error:
        raise ConnectFailed(
            f"fd:{target}: descriptor {number} is not open; have it inherited, without close-on-exec"
        ) from error
    if _in_use(number):
        raise ConnectFailed(
            f"fd:{target}: descriptor {number} is in use by this process itself, such as by its event loop; "
            "give one that nothing else uses: os.dup() makes one, and so does a socket's detach()"
        )
    return number


def let_go(number: int) -> None:
    """Close a descriptor; one that every process expects to be open leads to /dev/null instead."""
    if number >= _STANDARD:
        os.close(number)
        return
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, number)
    os.close(null)


def _in_use(number: int) -> bool:
    """Whether an event loop of this process waits for it, or an object of Python's owns it.

    The kernel says what an epoll instance has; what no loop has waited for yet, such as the end of trio's
    wakeup socket that is only written to, is a socket object.
    """
    if number < _STANDARD:
        return False
    if number in _polled():
        return True
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return False
    return any(isinstance(one, socket.socket) and one.fileno() == number for one in gc.get_objects())


def _polled() -> set[int]:
    found: set[int] = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}") == "anon_inode:[eventpoll]":
                with open(f"/proc/self/fdinfo/{entry}", "rb") as info:
                    found.add(int(entry))
                    found.update(int(one) for one in _LISTED.findall(info.read()))
    return found
