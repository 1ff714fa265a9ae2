"""Lab 2: the dirty log. Fill the gaps that say TODO; `kvmmig lab check .` tells how you do."""

from __future__ import annotations

import trio

import kvmmig
from kvmmig.machine.pageset import PageSet


async def watch(machine: kvmmig.Machine, looks: int, every: float) -> list[list[int]]:
    """The pages that were written between one look and the next, ``every`` seconds later, for each look."""
    tracker = machine.dirty_tracker()
    found: list[list[int]] = []
    pages = PageSet(machine.memory.n_pages)
    # TODO: start the tracker, and collect once: that finds all pages. All its calls go into a thread.
    # TODO: then sleep, collect into an empty set, and keep its pages: pages.pages(0, n_pages).tolist().
    # TODO: whatever happens, stop the tracker at the end.
    _ = tracker, pages, looks, every
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
