"""No call holds the event loop: while it does, no monitor answers and no cancel takes effect."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from time import perf_counter

import trio

from kvmmig.migration.policy import Limits
from kvmmig.testing._ends import Maker, opened, promise
from kvmmig.testing._transfer import incompressible, offer, require, transfer
from kvmmig.transport import ReceiveChannel, SendChannel

_STEP = Limits().step
_CALLS = 40
_SOME = 4  # of these calls may be unlucky, on top of what the host does to a bare loop
_BARE = 1 << 18  # bytes that the bare loop reads between two checkpoints: some 50 us


@promise
async def check_no_call_holds_the_loop(maker: Maker) -> None:
    """However much is offered, no part of a call between two checkpoints lasts as long as a step."""
    with _watched_steps() as steps:

        async def send(sender: SendChannel) -> None:
            steps.watch("sending")
            for _ in range(_CALLS):
                await offer(sender, [incompressible()])
                if any(steps.held(what) > steps.allowed(what) for what in ("sending", "receiving")):
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
            f"{steps.worst(what) * 1000:.0f} ms at worst; a loop that only reads /dev/zero was held "
            f"{steps.held('bare')} times meanwhile",
        )


async def _bare_loop(steps: _Steps) -> None:
    """What no transport does less than: one call of the system that copies memory without the GIL."""
    steps.watch("bare")
    buffer = bytearray(_BARE)
    with open("/dev/zero", "rb", buffering=0) as zero:  # noqa: ASYNC230 - it never waits
        while True:
            zero.readinto(buffer)
            await trio.lowlevel.checkpoint()


class _Steps(trio.abc.Instrument):
    """How long tasks run between two checkpoints, less the time in which the host gave them no CPU.

    What else a busy host does to them, it does to a bare loop.
    """

    def __init__(self, schedule: int | None) -> None:
        """``schedule`` is this thread's ``schedstat``, open, where the kernel has such."""
        self.names: list[str] = []
        self._of: dict[trio.lowlevel.Task, str] = {}
        self._count: dict[str, int] = {}
        self._held: dict[str, list[float]] = {}
        self._schedule = schedule
        self._began = self._waited = 0.0

    def watch(self, name: str) -> None:
        """This task is called so; all that nobody named are the channel's own."""
        self._of[trio.lowlevel.current_task()] = name

    def held(self, name: str) -> int:
        return len(self._held.get(name, ()))

    def worst(self, name: str) -> float:
        return max(self._held.get(name, [0.0]))

    def allowed(self, name: str) -> float:
        """So often a bare loop would have been held in as many steps, threefold, and `_SOME`."""
        bare = self.held("bare") / max(self._count.get("bare", 0), 1)
        return _SOME + 3 * bare * self._count.get(name, 0)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._waited = self._without_cpu()
        self._began = perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = perf_counter() - self._began
        name = self._of.get(task, "a task of the channel's")
        self._count[name] = self._count.get(name, 0) + 1
        if took > _STEP and (took := took - (self._without_cpu() - self._waited)) > _STEP:
            self._held.setdefault(name, []).append(took)
            if name != "bare" and name not in self.names:
                self.names.append(name)

    def _without_cpu(self) -> float:
        """Seconds in which this thread could have run and was not let."""
        if self._schedule is None:
            return 0.0
        # proc(5), Documentation/scheduler/sched-stats.rst: on the CPU, waiting for it, time slices
        return int(os.pread(self._schedule, 100, 0).split()[1]) / 1e9


@contextlib.contextmanager
def _watched_steps() -> Iterator[_Steps]:
    with contextlib.ExitStack() as stack:
        schedule = None
        with contextlib.suppress(OSError):
            schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, schedule)
        steps = _Steps(schedule)
        trio.lowlevel.add_instrument(steps)
        stack.callback(trio.lowlevel.remove_instrument, steps)
        yield steps
