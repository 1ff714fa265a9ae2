"""How long a command lives: until it is done, or until a signal asks it to end."""

from __future__ import annotations

import gc
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from kvmmig.cli.forced_exit import ForcedExit
from kvmmig.errors import KvmmigError

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_to_end(command: Callable[[], Awaitable[int]], *, forced_exit: ForcedExit | None = None) -> int:
    """Run a command and return its exit status; a signal cancels it, and the status is then 128 + its number.

    Raises what the command raised, alone: a `KvmmigError` out of the groups that nurseries make of it. A
    command that does not end when a signal cancels it is left by ``forced_exit``, whatever holds it up.
    """
    forced = forced_exit if forced_exit is not None else ForcedExit()
    received: list[int] = []
    ended: list[bool] = []  # whether the command has, in whatever way: else the loop itself is broken

    async def main() -> int:
        status = 0
        scope = trio.CancelScope()
        token = trio.lowlevel.current_trio_token()

        def heed(number: int, frame: object) -> None:
            received.append(number)
            forced.begin(128 + received[0])  # at once: the event loop may be what is held up
            with suppress(OSError, trio.RunFinishedError):  # it may even be broken: the forced exit is not
                token.run_sync_soon(scope.cancel, idempotent=True)

        try:
            with scope, _heeding(heed):
                status = await command()
        except* KvmmigError:
            if not received:  # else it comes from what the signal cut short
                raise
        finally:
            ended.append(True)
        return 128 + received[0] if received else status

    # What has been imported stays. Without this, a full garbage collection walks all of it, for tens of
    # milliseconds in which the event loop answers nobody.
    gc.collect()
    gc.freeze()
    try:
        return trio.run(main)
    except BaseException as error:
        if ended or isinstance(error, KeyboardInterrupt):
            if isinstance(error, BaseExceptionGroup):
                raise the_error(error) from None
            raise
        # No block has ended in its own way, and threads of the guest may run on: nobody could reach them.
        status = 128 + received[0] if received else 1
        forced.leave(status, f"the event loop is broken, and this process ends: {error.__cause__ or error!r}")
    finally:
        forced.stop()


@contextmanager
def _heeding(heed: Callable[[int, object], None]) -> Iterator[None]:
    # Who starts a program with a signal ignored (nohup, a shell's background) wants it ignored.
    heeded = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    found = {number: signal.signal(number, heed) for number in heeded}
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def the_error(problem: BaseException) -> BaseException:
    """The error that a person should see; the group itself where there is more to it than sentences."""
    leaves = list(_leaves(problem))
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            return leaf
    if all(isinstance(leaf, KvmmigError) for leaf in leaves):
        return leaves[0]
    if all(isinstance(leaf, BrokenPipeError) for leaf in leaves):  # "kvmmig migrate ... | head"
        return leaves[0]
    return problem


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
