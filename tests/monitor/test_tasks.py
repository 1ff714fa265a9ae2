"""Tasks that outlive a block of code, whatever that is cancelled by."""

from __future__ import annotations

import trio
import trio.testing

from kvmmig.monitor.tasks import outliving


async def test_a_cancel_reaches_the_block_first_and_its_tasks_when_that_has_ended() -> None:
    ended: list[str] = []

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("task")

    with trio.fail_after(60), trio.CancelScope() as scope:
        async with outliving() as tasks:
            tasks.start_soon(task)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                ended.append("block")
    assert ended == ["block", "task"]
