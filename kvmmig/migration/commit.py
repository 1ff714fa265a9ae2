"""The commit: how the source lets go of a guest that stands still, so that never two sides run it.

"go" is the point of no return. Whoever may start the guest has it from the moment that the last byte of "go"
was accepted; a channel that only stores it has it when it has ended well. Drawn in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from kvmmig.errors import KvmmigError, MigrationError
from kvmmig import stream
from kvmmig.migration.peer import Peer
from kvmmig.migration.steps import because
from kvmmig.transport import Channel

_GRACE = 0.05  # seconds


class SayGo(Protocol):
    """Sends "go"; ``accepted`` is called the moment that its last byte was accepted."""

    async def __call__(self, *, accepted: Callable[[], None] | None = None) -> None: ...


async def commit(
    channel: Channel,
    peer: Peer,
    *,
    say_go: SayGo,
    let_go: Callable[[], None],
    patience: float,
) -> None:
    """Hand the guest over; ``let_go`` is called at the point of no return.

    Each thing that is waited for may take ``patience`` seconds. Raises a `MigrationError` or a
    `TransportError`; whether the guest was let go by then, ``let_go`` knows.
    """

    async def finish() -> None:
        await _bounded(channel, peer, channel.flush, "did not take the last bytes", patience)
        await _bounded(channel, peer, channel.aclose, "was not done", patience)

    async def see_it_run() -> None:
        await peer.hear(stream.Kind.RUNNING, patience)
        channel.abort()

    if channel.features.stores:
        # Nobody starts it from there by themselves: it stays ours until all of it is safe.
        await say_go()
        await finish()
        let_go()
    elif channel.features.two_way:
        await peer.hear(stream.Kind.READY, patience)
        await say_go(accepted=let_go)
        await _with_grace(see_it_run)
    else:
        # What keeps a reader from taking all of it is best found out now.
        await _bounded(channel, peer, channel.flush, "did not take the last bytes", patience)
        await say_go(accepted=let_go)
        await _with_grace(finish)


async def _bounded(
    channel: Channel, peer: Peer, call: Callable[[], Awaitable[None]], what: str, patience: float
) -> None:
    with trio.move_on_after(patience) as scope:
        await call()
    if scope.cancelled_caught:
        raise MigrationError(f"{peer.name} {what} within {patience:g} s{because(channel)}")


async def _with_grace(call: Callable[[], Awaitable[None]]) -> None:
    """After "go": a cancel from outside waits a moment, so that who has the guest gets the last byte too."""
    scope = trio.CancelScope(shield=True)
    failure: KvmmigError | None = None

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            scope.deadline = trio.current_time() + _GRACE

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            with scope:
                await call()
        except KvmmigError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
