"""A channel's rule that one task sends, and one receives, at a time."""

from __future__ import annotations

from kvmmig.errors import ChannelBusy


class OneAtATime:
    """Raises `ChannelBusy` when a second task enters.

    ``self._sending = OneAtATime("sending")``, and ``with self._sending:`` around the whole of `send_some`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise ChannelBusy(f"another task is {self._what} on this channel; let one task do it at a time")
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False
