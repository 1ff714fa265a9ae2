"""The commit: how the source lets go of a guest that stands still, so that never two sides run it.

"go" is the point of no return. Whoever may start the guest has it from the moment that "go" is offered to the
channel: what a channel says afterwards, or fails to say, proves nothing. A transport that only stores has the
guest when it has ended well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from kvmmig import stream
from kvmmig.errors import MigrationError
from kvmmig.migration.peer import Peer
from kvmmig.migration.steps import because
from kvmmig.transport.guard import GuardedChannel


class SendGo(Protocol):
    """Sends "go"; ``offering`` is called right before it is offered to the channel, and may refuse."""

    async def __call__(self, *, offering: Callable[[], None] | None = None) -> None: ...


async def commit(
    channel: GuardedChannel,
    peer: Peer,
    *,
    stores: bool,
    send_go: SendGo,
    let_go: Callable[[], None],
    patience: float,
) -> None:
    """Hand the guest over; ``let_go`` is called at the point of no return.

    Each thing that is waited for may take ``patience`` seconds. Raises a `MigrationError` or a
    `TransportError`; whether the guest was let go by then, ``let_go`` knows.
    """

    async def finish() -> None:
        await bounded(channel, peer, channel.flush, "did not take the last bytes", patience)
        await bounded(channel, peer, channel.aclose, "was not done", patience)

    if stores:
        # Nobody starts it from there by themselves: it stays ours until all of it is safe.
        await send_go()
        await finish()
        let_go()
    elif channel.two_way:
        await peer.hear(stream.Kind.READY, patience)
        await send_go(offering=let_go)
        await peer.hear(stream.Kind.RUNNING, patience)
        channel.abort()
    else:
        # What keeps a reader from taking all of it is best found out now.
        await bounded(channel, peer, channel.flush, "did not take the last bytes", patience)
        await send_go(offering=let_go)
        await finish()


async def bounded(
    channel: GuardedChannel, peer: Peer, call: Callable[[], Awaitable[None]], what: str, patience: float
) -> None:
    """Await ``call()`` for ``patience`` seconds at most; then raise `MigrationError`: the peer ``what``."""
    with trio.move_on_after(patience) as scope:
        await call()
    if scope.cancelled_caught:
        raise MigrationError(f"{peer.name} {what} within {patience:g} s{because(channel)}")
