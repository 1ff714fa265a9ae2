"""Those who look at one page: each gets what is new, and all of it where it was too slow for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import trio

from kvmmig.cli.livepage.history import History, Message

#: Seconds after which a browser hears that there is nothing new: so one that is gone is noticed.
_SILENCE = 10.0


class Viewers:
    """Gives what a `History` has to any number of readers. None of them waits for another."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._present: set[Viewer] = set()
        self._whole: bytes | None = None

    def __len__(self) -> int:
        return len(self._present)

    def publish(self) -> None:
        """Tell everybody what has changed in the history."""
        message = self._history.news()
        if message is None:
            return
        self._whole = None
        if message["kind"] == "whole":
            for viewer in self._present:
                viewer.put(None)
        elif self._present:
            encoded = _encoded(message)
            for viewer in self._present:
                viewer.put(encoded)

    def whole(self) -> bytes:
        """All of it, as one message of the stream."""
        if self._whole is None:
            self._whole = _encoded(self._history.whole())
        return self._whole

    @contextmanager
    def present(self) -> Iterator[Viewer]:
        """One more reader, for the block."""
        viewer = Viewer(self)
        self._present.add(viewer)
        try:
            yield viewer
        finally:
            self._present.discard(viewer)


class Viewer:
    """One reader. At most one message waits for it, however slow it is."""

    def __init__(self, viewers: Viewers) -> None:
        self._viewers = viewers
        self._waiting: bytes | None = None
        self._needs_whole = True
        self._changed = trio.Event()
        self._changed.set()

    def put(self, message: bytes | None) -> None:
        """What is new; None is all of it."""
        self._needs_whole |= message is None or self._waiting is not None
        self._waiting = None if self._needs_whole else message
        self._changed.set()

    async def next_message(self) -> bytes:
        """A server-sent event: first all that is known. Waits for 10 s at most. A cancel loses nothing."""
        with trio.move_on_after(_SILENCE):
            await self._changed.wait()
        if not self._changed.is_set():
            return b": nothing new\n\n"
        self._changed = trio.Event()
        message = self._viewers.whole() if self._needs_whole else self._waiting
        self._needs_whole, self._waiting = False, None
        assert message is not None
        return message


def _encoded(message: Message) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"
