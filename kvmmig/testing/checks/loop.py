"""No call holds the event loop: while it does, no monitor answers and no cancel takes effect."""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import Self

import trio

from kvmmig.migration.policy import Limits
from kvmmig.testing._ends import Maker, opened, promise
from kvmmig.testing._transfer import incompressible, offer, require, transfer
from kvmmig.transport import ReceiveChannel, SendChannel

_STEP = Limits().step
_CALLS = 40
_SOME = 4  # of these calls may be unlucky, on top of what the host does to a bare loop
_BARE = 1 << 18  # bytes that the bare loop copies between two checkpoints: some 50 us


@promise
async def check_no_call_holds_the_loop(maker: Maker) -> None:
    """However much is offered, no part of a call between two checkpoints lasts as long as a step."""
    with _Steps() as steps:

        async def send(sender: SendChannel) -> None:
            steps.watch("sending")
            for _ in range(_CALLS):
                await offer(sender, [incompressible()])
                if max(steps.held("sending"), steps.held("receiving")) > 3 * _SOME:
                    break

        async def receive(receiver: ReceiveChannel) -> bytes:
            steps.watch("receiving")
            buffer = memoryview(bytearray(32 << 20))
            while await receiver.receive_some(buffer):
                pass
            return b""

        async with opened(maker) as ends, trio.open_nursery() as nursery:
            nursery.start_soon(_bare_loop, steps)
            await transfer(ends, send, receive)
            nursery.cancel_scope.cancel()
    for what in steps.names:
        held, allowed = steps.held(what), steps.allowed(what)
        require(
            held <= allowed,
            f"{what} held the event loop {held} times for more than {_STEP * 1000:g} ms, for "
            f"{steps.worst(what) * 1000:.0f} ms at worst; a loop that only copies memory was held "
            f"{steps.held('bare')} times meanwhile",
        )


async def _bare_loop(steps: _Steps) -> None:
    steps.watch("bare")
    data = bytes(_BARE)
    while True:
        bytearray(data)
        await trio.lowlevel.checkpoint()


class _Steps(trio.abc.Instrument):
    """How long tasks run between two checkpoints. A busy host does to them what it does to a bare loop."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._of: dict[trio.lowlevel.Task, str] = {}
        self._took: dict[str, list[float]] = {}
        self._began = 0.0

    def watch(self, name: str) -> None:
        """This task is called so; all that nobody named are the channel's own."""
        self._of[trio.lowlevel.current_task()] = name

    def held(self, name: str) -> int:
        return sum(took > _STEP for took in self._took.get(name, ()))

    def worst(self, name: str) -> float:
        return max(self._took.get(name, [0.0]))

    def allowed(self, name: str) -> float:
        """So often a bare loop would have been held in the same time, threefold, and `_SOME`."""
        bare = sum(self._took["bare"])
        running = sum(min(took, _STEP) for took in self._took[name])
        return _SOME + 3 * self.held("bare") * running / bare

    def __enter__(self) -> Self:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        trio.lowlevel.remove_instrument(self)
        self.names = [name for name in self._took if name != "bare"]

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = perf_counter() - self._began
        self._took.setdefault(self._of.get(task, "a task of the channel's"), []).append(took)
