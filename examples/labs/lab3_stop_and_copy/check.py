"""What is still wrong in lab 3, and why."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import trio

from kvmmig.errors import KvmmigError
from kvmmig.kvm import IoIn, IoOut
from kvmmig.machine import Entry, Machine, MachineConfig, Program, State

NEEDS_KVM = True


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    hooks = list(_check_hook(student))
    yield from hooks
    if hooks:
        return
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as directory:
        path = Path(directory) / "guest"
        if wrong := trio.run(_check_save, student, path):
            yield wrong
            return
        restored = [*_check_new_process(student, path)]
        yield from restored
        if not restored:
            yield from trio.run(_check_torn, student, path)


def _check_hook(student: ModuleType) -> Iterator[str]:
    calls: list[int] = []
    for was_saved in (False, True):
        serve = student.hook(lambda: calls.append(1), was_saved)
        if serve(IoOut(student.SAVE, 1, b"5")) is None or not calls:
            yield "a guest that writes to the port SAVE asks to be saved: call asked(), and return b''"
            return
        if (read := serve(IoIn(student.SAVE, 1, 1))) != bytes([was_saved]):
            yield f"where was_saved is {was_saved} the guest reads {int(was_saved)} from SAVE, not {read!r}"
        if serve(IoOut(0x3F8, 1, b"5")) is not None:
            yield "the serial port is not yours: return None, or nobody will see what the guest prints"


async def _check_save(student: ModuleType, path: Path) -> str:
    token, asked = trio.lowlevel.current_trio_token(), trio.Event()
    serve = student.hook(lambda: token.run_sync_soon(asked.set), False)
    async with Machine.open(MachineConfig(memory=1 << 20), on_exit=serve) as machine:
        await machine.load(Program("digits", Entry.REAL16, student.GUEST))
        await machine.start()
        with trio.fail_after(20):
            await asked.wait()
        await student.save(machine, path)
        if machine.state is not State.PAUSED:
            return f"after save the guest {machine.state}: a copy of one that runs was never true at any time"
    if not await trio.Path(path).exists():
        return f"save has written no file {path.name}"
    return ""


def _check_new_process(student: ModuleType, path: Path) -> Iterator[str]:
    """In a process of its own nothing is there but the file."""
    assert student.__file__ is not None
    command = [sys.executable, student.__file__, "restore", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        yield f"restored in a new process: {done.stderr.strip().splitlines()[-1]}"
    elif done.stdout != "56789; it exited with status 0\n":
        yield (
            "restored in a new process, the guest prints 56789 and exits with 0, and yours: "
            f"{done.stdout.strip()!r}. Are all pages there, and all sections?"
        )


async def _check_torn(student: ModuleType, path: Path) -> list[str]:
    whole = await trio.Path(path).read_bytes()
    torn = path.with_name("torn")
    wrong = []
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0x10
    for what, data in (
        ("ends in the middle", whole[: len(whole) // 2]),
        ("has one bit changed", bytes(changed)),
    ):
        await trio.Path(torn).write_bytes(data)
        try:
            async with student.restore(torn, lambda why: None, lambda said: None):
                wrong.append(
                    f"a file that {what} is taken for a guest: put a checksum of all of it into the file"
                )
                return wrong
        except (KvmmigError, ValueError):
            pass  # said in words, as it should be
    lacking = await student.run_restored(path, ["cpu0/regs"])
    if lacking.startswith("56789"):
        wrong.append(
            "without the section cpu0/regs the guest goes on as if nothing had happened: hand on leave_out"
        )
    return wrong
