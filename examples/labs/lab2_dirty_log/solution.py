"""Lab 2, one solution."""

from __future__ import annotations

import trio

import kvmmig
from kvmmig.machine.pageset import PageSet


async def watch(machine: kvmmig.Machine, looks: int, every: float) -> list[list[int]]:
    """The pages that were written between one look and the next, ``every`` seconds later, for each look."""
    tracker = machine.dirty_tracker()
    found: list[list[int]] = []
    pages = PageSet(machine.memory.n_pages)
    try:
        await trio.to_thread.run_sync(tracker.start)
        await trio.to_thread.run_sync(tracker.collect, pages)
        for _ in range(looks):
            await trio.sleep(every)
            pages.clear()
            await trio.to_thread.run_sync(tracker.collect, pages)
            found.append(pages.pages(0, machine.memory.n_pages).tolist())
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(tracker.stop)
    return found


async def main() -> None:
    async with kvmmig.open_machine("dirtier", memory="64MiB", settings={"hot": "4MiB"}) as machine:
        await machine.start()
        await trio.sleep(0.5)
        for number, pages in enumerate(await watch(machine, 5, 0.2), 1):
            first = f", from page {pages[0]} on" if pages else ""
            print(f"{number * 0.2:4.1f} s {len(pages):6} pages of {machine.memory.n_pages} written{first}")


if __name__ == "__main__":
    trio.run(main)
