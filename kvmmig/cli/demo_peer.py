"""The demo's other side: a process that receives a guest, checks it, lets it go on, and checks it again.

``python -m kvmmig.cli.demo_peer URI`` prints one JSON object a line: ``{"event": "listening", "uri": ...}``,
then either ``{"event": "result", ...}`` with the fields of `Result`, or ``{"event": "error", "text": ...}``.
"""

from __future__ import annotations

import sys

import msgspec
import trio

from kvmmig import guests
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.logs import logging_to, to_stderr
from kvmmig.errors import KvmmigError, MachineError
from kvmmig.guests import Check
from kvmmig.machine import Ending, Machine
from kvmmig.migration.incoming import IncomingMigration

_GO_ON = 1.0  # seconds that the guest runs on here, at the least
_PASSES = 2  # and passes that it finishes: the first may have begun elsewhere, so the second is whole
_PATIENCE = 30.0  # seconds that it may take for them
_LIFE = 120.0  # seconds after which nobody can still be interested


class Listening(msgspec.Struct, frozen=True, tag_field="event", tag="listening"):
    """It can be connected to."""

    uri: str


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="result"):
    """What the checks found."""

    pages: int  # pages that the host's check verified after the guest had gone on
    passes_before: int  # the guest's own passes when it arrived
    passes_after: int
    letters: str  # what the guest printed here
    faults: list[str]  # what is wrong, in sentences; none when all is well


class Failure(msgspec.Struct, frozen=True, tag_field="event", tag="error"):
    """It did not arrive."""

    text: str


Message = Listening | Result | Failure


class Letters:
    """Collects what a guest prints, and says when that is ``wanted`` letters or more."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._token = trio.lowlevel.current_trio_token()
        self.restart()

    @property
    def text(self) -> str:
        """All of it."""
        return self._written.decode(errors="replace")

    def restart(self) -> None:
        """Forget what was collected. Only while the guest is stopped."""
        self._written = bytearray()
        self.enough = trio.Event()

    def add(self, data: bytes) -> None:
        """For a vCPU's thread."""
        self._written.extend(data)
        if sum(letter.isalnum() for letter in self.text) >= self._wanted:
            self._token.run_sync_soon(self.enough.set)


def main() -> int:
    """Receive one guest; the exit status is 0 when it arrived and all is well with it."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kvmmig.cli.demo_peer URI")
    try:
        with logging_to(to_stderr):
            return run_to_end(_main)
    except KvmmigError as error:
        _print(Failure(str(error)))
        return 1


async def _main() -> int:
    with trio.move_on_after(_LIFE):
        result = await _receive(sys.argv[1])
        _print(result)
        return 1 if result.faults else 0
    raise KvmmigError(f"no guest came and was checked within {_LIFE:g} s")


async def _receive(uri: str) -> Result:
    letters = Letters(_PASSES)
    incoming = IncomingMigration(
        uri,
        output=letters.add,
        keep_listening=False,
        on_listening=lambda where: _print(Listening(str(where))),
    )
    async with incoming.machine() as machine:
        await machine.pause()
        before = await _check(machine)
        letters.restart()
        await machine.resume()
        await _go_on(machine, letters)
        ending: Ending | None = None
        try:
            await machine.pause()
        except KvmmigError:  # it ended: its last words are the fault
            ending = await machine.wait()
        after = await _check(machine)
    faults = [f"on arrival: {fault}" for fault in before.faults]
    faults += [f"after running on: {fault}" for fault in after.faults]
    faults += [line.strip() for line in letters.text.splitlines() if "FAIL" in line]
    if ending is not None:
        faults.append(f"the guest did not go on: {ending}")
    elif after.passes < before.passes + _PASSES:
        faults.append(
            f"the guest finished {after.passes - before.passes} passes in {_PATIENCE:g} s, and should have "
            f"finished {_PASSES}"
        )
    return Result(
        pages=after.pages,
        passes_before=before.passes,
        passes_after=after.passes,
        letters=letters.text,
        faults=faults,
    )


async def _go_on(machine: Machine, letters: Letters) -> None:
    """Let it run until it has printed enough letters, or has ended, or time is up."""
    async with trio.open_nursery() as nursery:

        async def until_ended() -> None:
            await machine.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(until_ended)
        with trio.move_on_after(_PATIENCE):
            await trio.sleep(_GO_ON)
            await letters.enough.wait()
        nursery.cancel_scope.cancel()


async def _check(machine: Machine) -> Check:
    found = await trio.to_thread.run_sync(guests.check_machine, machine)
    if found is None:
        raise MachineError(
            f"the guest {machine.config.name!r} is none that the host can check; run a dirtier"
        )
    return found


def _print(message: Message) -> None:
    print(msgspec.json.encode(message).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
