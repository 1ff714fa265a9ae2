"""The life of a machine under control, as a table: what a command does in each state, or why it is refused.

It is about the machine and the tasks around it. What the guest does, running or paused, moved or ended, is
the machine's own table, in `kvmmig.machine.machine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import trio

from kvmmig.errors import WrongState
from kvmmig.machine import Machine


class LifeState(StrEnum):
    """Where it is in its life; the text completes "the control ..."."""

    EMPTY = "has no guest"
    EXPECTING = "has no guest, but whoever opened it is about to give it one"
    LOADING = "is loading its guest"
    AWAITING = "awaits its guest by migration, and has yet to be told from where"
    OPENING = "is about to listen for its guest"
    LISTENING = "listens for its guest, or receives it"
    HERE = "has its guest"
    RESETTING = "resets its guest"
    MIGRATING = "has its guest, which migrates from here"
    SWITCHING_OVER = "has its guest paused, for a migration that hands it over"


_EMPTY, _EXPECTING, _LOADING = LifeState.EMPTY, LifeState.EXPECTING, LifeState.LOADING
_AWAITING, _OPENING, _LISTENING = LifeState.AWAITING, LifeState.OPENING, LifeState.LISTENING
_HERE, _RESETTING = LifeState.HERE, LifeState.RESETTING
_MIGRATING, _SWITCHING = LifeState.MIGRATING, LifeState.SWITCHING_OVER

_NO_GUEST = {
    **dict.fromkeys((_EMPTY, _EXPECTING, _LOADING), "{name!r} has no guest yet"),
    **dict.fromkeys((_AWAITING, _OPENING, _LISTENING), "the guest has not arrived yet"),
}
_HAS_GUEST = dict.fromkeys(
    (_LOADING, _HERE, _RESETTING, _MIGRATING, _SWITCHING),
    "{name!r} has its guest already; start another machine for another one",
)
_AWAITS = dict.fromkeys(
    (_OPENING, _LISTENING),
    "The incoming migration has already been started: {name!r} waits for its guest at {source}",
)
_NOT_FINAL = "Migration is not finalized yet; wait for its end, or cancel it"  # as QEMU says
_IN_PROGRESS = "There's a migration process in progress"  # QEMU's sentence: tools look for it
_BEING_RESET = "the guest is being reset; {command} it when that is done"
#: What `Life.refusal` says of a guest that has not moved away.
NOT_MOVED = (
    "there is nothing to take back: the guest {guest}; this is for one that was handed over and does not run "
    "on the other side"
)

# What each command leads to in each state; where it is refused, the sentence that says so.
#
#               load           it is loaded
#     EMPTY ----------> LOADING ------------.        reset, and its end
#       ^  |               |                v      ,----------------> RESETTING
#       |  | defer         '--> EMPTY     HERE <--'
#       |  v                               ^  ^ \  migrate       the guest is to stop
#  AWAITING ------> OPENING ---> LISTENING-'  |  `--------> MIGRATING ------> SWITCHING_OVER
#         ^ listen     |            |         |                 |                |
#         '------------'------------'         '-----------------'----------------'  its end
#
# EXPECTING is EMPTY but for the commands that wait there, as they do in LOADING and OPENING.
COMMANDS: Mapping[str, Mapping[LifeState, LifeState | str]] = {
    "load": {**dict.fromkeys((_EMPTY, _EXPECTING, _AWAITING), _LOADING), **_HAS_GUEST, **_AWAITS},
    "adopt": {**dict.fromkeys((_EMPTY, _EXPECTING, _AWAITING), _HERE), **_HAS_GUEST, **_AWAITS},
    "defer": {**dict.fromkeys((_EMPTY, _EXPECTING, _AWAITING), _AWAITING), **_HAS_GUEST, **_AWAITS},
    "listen": {**dict.fromkeys((_EMPTY, _EXPECTING, _AWAITING), _OPENING), **_HAS_GUEST, **_AWAITS},
    "pause": {
        **_NO_GUEST,
        **{state: state for state in (_HERE, _RESETTING, _MIGRATING)},
        _SWITCHING: _NOT_FINAL,
    },
    "resume": {
        **_NO_GUEST,
        **{state: state for state in (_HERE, _RESETTING, _MIGRATING)},
        _SWITCHING: _NOT_FINAL,
    },
    "reset": {
        **_NO_GUEST,
        _HERE: _RESETTING,
        _RESETTING: "the guest is being reset already",
        **dict.fromkeys(
            (_MIGRATING, _SWITCHING), "a guest can't be reset while it migrates; cancel the migration first"
        ),
    },
    "migrate": {
        **_NO_GUEST,
        **dict.fromkeys((_AWAITING, _OPENING, _LISTENING), "Guest is waiting for an incoming migration"),
        _HERE: _MIGRATING,
        _RESETTING: _BEING_RESET,
        **dict.fromkeys((_MIGRATING, _SWITCHING), _IN_PROGRESS),
    },
    "measure": {
        **_NO_GUEST,
        _HERE: _HERE,
        _RESETTING: _BEING_RESET,
        **dict.fromkeys(
            (_MIGRATING, _SWITCHING),
            "a migration is running and needs the dirty log for itself; see query-migrate",
        ),
    },
    "take back": {
        **_NO_GUEST,
        _HERE: _HERE,
        **dict.fromkeys((_RESETTING, _MIGRATING, _SWITCHING), NOT_MOVED),
    },
}
#: What happens, and what that leads to; in any other state it can't happen.
EVENTS: Mapping[str, Mapping[LifeState, LifeState]] = {
    "loaded": {_LOADING: _HERE},
    "not loaded": {_LOADING: _EMPTY},
    "listens": {_OPENING: _LISTENING},
    "arrived": {_LISTENING: _HERE},
    "not arrived": {_OPENING: _AWAITING, _LISTENING: _AWAITING},
    "reset is over": {_RESETTING: _HERE},
    "switchover": dict.fromkeys((_MIGRATING, _SWITCHING), _SWITCHING),
    "migration is over": dict.fromkeys((_MIGRATING, _SWITCHING), _HERE),
}
#: A command that needs the guest waits here: its guest is about to be there, or to be awaited.
_UNSETTLED = frozenset({_EXPECTING, _LOADING, _OPENING})


class Life:
    """Where one machine under control is in its life; and the machine, once there is one."""

    def __init__(self, name: str, *, guest_follows: bool = False) -> None:
        #: What its clients are told that it is called.
        self.name = name
        self.machine: Machine | None = None
        #: Where it listens for its guest, for sentences.
        self.source = ""
        self._state = _EXPECTING if guest_follows else _EMPTY
        self._changed = trio.Event()

    @property
    def state(self) -> LifeState:
        """Where it is."""
        return self._state

    @property
    def awaits(self) -> bool:
        """Its guest is to come by migration, and is not here yet."""
        return self._state in (_AWAITING, _OPENING, _LISTENING)

    @property
    def migrates(self) -> bool:
        """A migration away from here is running."""
        return self._state in (_MIGRATING, _SWITCHING)

    def check(self, command: str) -> LifeState:
        """What ``command`` leads to. Raises `WrongState`, as the table says."""
        cell = COMMANDS[command][self._state]
        if isinstance(cell, LifeState):
            return cell
        raise self.refusal(cell.replace("{command}", command))

    def refusal(self, sentence: str) -> WrongState:
        """An error of this text, in which ``{name!r}``, ``{source}`` and ``{guest}`` are filled in."""
        guest = self.machine.state if self.machine is not None else "is not here"
        return WrongState(sentence.format(name=self.name, source=self.source, guest=guest))

    def enter(self, command: str) -> None:
        """Go where ``command`` leads. Raises `WrongState`, and nothing has changed."""
        self._go_to(self.check(command))

    def happened(self, event: str) -> None:
        """Go where this leads. `KeyError` where it can't happen: a bug here."""
        self._go_to(EVENTS[event][self._state])

    def guest(self, command: str) -> Machine:
        """The machine, to do this to it. Raises `WrongState`, as the table says."""
        self.check(command)
        assert self.machine is not None  # the table lets nothing be done to a guest that is not there
        return self.machine

    async def settled(self) -> None:
        """Wait while the guest is about to be there, or to be awaited."""
        while self._state in _UNSETTLED:
            await self._changed.wait()

    def _go_to(self, state: LifeState) -> None:
        if state is not self._state:
            self._state = state
            self._changed.set()
            self._changed = trio.Event()
