"""Lab 3: stop and copy. Fill the gaps that say TODO; `kvmmig lab check .` tells how you do."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kvmmig.kvm import Exit
from kvmmig.machine import Entry, ExitHook, Machine, MachineConfig, Program

SAVE = 0x510  # the guest writes here: save me. What it reads says whether it was: 1, else 0
# Prints 0 to 4, asks to be saved, waits until it was, prints 5 to 9, and exits with 0 by port 0xf4.
GUEST = bytes.fromhex(
    "baf803 b030"  # mov dx, 0x3f8; mov al, "0"
    "ee fec0 3c35 7510"  # next: out dx, al; inc al; cmp al, "5"; jne on
    "ba1005 88c4 ee"  # mov dx, SAVE; mov ah, al; out dx, al
    "ec 3c01 75fb"  # wait: in al, dx; cmp al, 1; jne wait
    "88e0 baf803"  # mov al, ah; mov dx, 0x3f8
    "3c3a 75e5"  # on: cmp al, "9" + 1; jne next
    "b000 e6f4 f4"  # mov al, 0; out 0xf4, al; hlt
)


def hook(asked: Callable[[], None], was_saved: bool) -> ExitHook:
    """Serves the port SAVE: a write calls ``asked``, a read gives 1 where the guest ``was_saved``, else 0."""

    def serve(why: Exit) -> bytes | None:
        # TODO 1: serve IoOut and IoIn of the port SAVE; None says that an exit is not yours.
        return None

    return serve


async def save(machine: Machine, path: Path) -> None:
    """Pause the machine, and write all of it to a new file."""
    # TODO 2: pause it, capture its sections; write them, its description, its memory, in a format of yours.
    # machine.description.encode() is the description; machine.memory.pages(number) are the bytes of a page.


@asynccontextmanager
async def restore(
    path: Path, on_exit: ExitHook, output: Callable[[bytes], None], leave_out: Collection[str] = ()
) -> AsyncIterator[Machine]:
    """A machine as the saved one was, and paused. Raises `ValueError` for a file that is not whole."""
    # TODO 3: read the file, and make a machine by its description, which MachineDescription.decode reads:
    # Machine.open(description.config(), description=description). Then fill its memory, apply the sections.
    raise ValueError(f"{path} can't be restored yet")
    yield  # type: ignore[unreachable]  # for the machine, in the block of Machine.open


async def run_until_saved(path: Path) -> str:
    """Run the guest, and save it when it asks for that. Returns what it has printed."""
    token, asked, said = trio.lowlevel.current_trio_token(), trio.Event(), bytearray()
    served = hook(lambda: token.run_sync_soon(asked.set), was_saved=False)
    async with Machine.open(MachineConfig(memory=1 << 20), output=said.extend, on_exit=served) as machine:
        await machine.load(Program("digits", Entry.REAL16, GUEST))
        await machine.start()
        with trio.move_on_after(2) as scope:
            await asked.wait()
        if scope.cancelled_caught:
            return "nobody has heard the guest asking"
        await save(machine, path)
    return said.decode(errors="replace")


async def run_restored(path: Path, leave_out: Collection[str] = ()) -> str:
    """Let the saved guest go on. Returns what it has printed, and how it ended."""
    said = bytearray()
    async with restore(path, hook(lambda: None, was_saved=True), said.extend, leave_out) as machine:
        await machine.start()
        with trio.move_on_after(5) as scope:
            ending = await machine.wait()
    if scope.cancelled_caught:
        return f"{said.decode(errors='replace')}; it goes on for ever"
    return f"{said.decode(errors='replace')}; {ending}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["restore", path, *leave_out]:
            print(trio.run(run_restored, Path(path), leave_out))
        case [] | ["save"]:
            print(trio.run(run_until_saved, Path("guest.saved")))
        case ["save", path]:
            print(trio.run(run_until_saved, Path(path)))
        case _:
            sys.exit("usage: python student.py save|restore FILE [SECTION...]")
