"""A machine's life as a table of states."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """Where a machine is in its life; the text completes "the guest ..."."""

    CREATED = "has not been started"
    RUNNING = "is running"
    PAUSED = "is paused"
    MOVED = "has moved away"
    ENDED = "has ended"
    CLOSED = "is closed"


# What each command does in each state; where there is no entry it is refused. What a guest does by itself is
# the one other way to change state: RUNNING -> ENDED.
#
#                 start, resume             end
#     CREATED ---------------> RUNNING -----------> ENDED --> CLOSED    close works everywhere
#        |           pause |   ^   ^                  ^
#        | apply           v   | resume               |
#        '--------------> PAUSED   | resume by force  |
#               mark_moved |       |                  | end, from everywhere
#                          v       |                  |
#                         MOVED ---+------------------+
COMMANDS: Mapping[str, Mapping[State, State]] = {
    "load": {State.CREATED: State.CREATED},
    "apply": {State.CREATED: State.PAUSED},
    "start": dict.fromkeys((State.CREATED, State.RUNNING, State.PAUSED), State.RUNNING),
    "resume": dict.fromkeys((State.RUNNING, State.PAUSED), State.RUNNING),
    "resume by force": dict.fromkeys((State.RUNNING, State.PAUSED, State.MOVED), State.RUNNING),
    "pause": dict.fromkeys((State.RUNNING, State.PAUSED), State.PAUSED),
    "reset": {state: state for state in (State.CREATED, State.RUNNING, State.PAUSED)},
    "feed": {state: state for state in (State.CREATED, State.RUNNING, State.PAUSED)},
    "capture": {State.PAUSED: State.PAUSED},
    "mark moved": dict.fromkeys((State.PAUSED, State.MOVED), State.MOVED),
    "end": {
        **dict.fromkeys((State.CREATED, State.RUNNING, State.PAUSED, State.MOVED, State.ENDED), State.ENDED),
        State.CLOSED: State.CLOSED,
    },
    "close": dict.fromkeys(State, State.CLOSED),
}
