"""What a machine's clients are told of, under QEMU's names where it has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmmig.machine import State
from kvmmig.monitor.life import Life
from kvmmig.monitor.parameters import MigrationSettings

#: What is told, and the members of its data; one with a star may be missing, as in QAPI.
EVENTS: Mapping[str, Mapping[str, type]] = {
    "GUEST_PANICKED": {"action": str, "x-kvmmig-report": str},
    "MIGRATION": {"status": str, "*x-kvmmig-peer": str},
    "MIGRATION_PASS": {"pass": int},
    "POWERDOWN": {},
    "RESET": {"guest": bool, "reason": str},
    "RESUME": {},
    "SHUTDOWN": {"guest": bool, "reason": str},
    "STOP": {},
    "X_KVMMIG_MIGRATION_ENDED": {"figures": dict},
}
Listener = Callable[[str, Mapping[str, object]], None]


class Events:
    """Calls whoever has subscribed, on the event loop."""

    def __init__(self, life: Life, settings: MigrationSettings) -> None:
        self._life = life
        self._settings = settings
        self._listeners: list[Listener] = []
        self._runs = False  # as the last STOP or RESUME said

    def subscribe(self, listener: Listener) -> None:
        """Tell ``listener`` of every event: its QMP name and its data. It must be quick and not raise."""
        self._listeners.append(listener)

    def emit(self, event: str, data: Mapping[str, object]) -> None:
        """Tell of it."""
        for listener in self._listeners:
            listener(event, data)

    def emit_of_migration(self, event: str, data: Mapping[str, object]) -> None:
        """Tell of it where the capability ``events`` is on."""
        if self._settings.capabilities["events"]:
            self.emit(event, data)

    def note_running(self, *, stopping: bool = False) -> None:
        """Tell of a STOP or a RESUME, if the guest does something else than was last told of.

        ``stopping``: a migration is about to pause it. Clients are told before they hear of the phase.
        """
        machine = self._life.machine
        if machine is None or machine.state in (State.ENDED, State.CLOSED):
            return  # that is told by another event
        runs = machine.state is State.RUNNING and not stopping
        if runs != self._runs:
            self._runs = runs
            self.emit("RESUME" if runs else "STOP", {})
