"""The guest that none of this must harm: a dirtier on a machine in this process."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import trio

from kvmmig import guests
from kvmmig.errors import KvmError
from kvmmig.guests import dirtier
from kvmmig.machine import Machine, MachineConfig, State
from tests.faults.waiting import until

MEMORY = 32 << 20
#: All that it rewrites over and over: more than the ways to any other side swallow.
HOT = 24 << 20


class Source:
    """The guest and its machine, which serve many cells: each gives them back."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Source]:
        """A guest that has filled its memory and is busy."""
        program = guests.find("dirtier").program(memory=MEMORY, cpus=1, settings={"hot": HOT})
        config = MachineConfig(memory=MEMORY, name=program.name, parameters=program.parameters)
        async with Machine.open(config) as machine:
            await machine.load(program)
            await machine.start()
            source = cls(machine)
            await source.goes_on()
            yield source

    async def goes_on(self) -> bool:
        """Whether the guest gets on with its work within a generous time."""
        before = self._progress()
        return await until(lambda: self._progress() != before)

    async def faults(self) -> list[str]:
        """What is wrong with the guest after a migration that failed, in sentences; none when all is well."""
        machine = self.machine
        if machine.state is not State.RUNNING:
            return [f"the guest {machine.state}"]
        found = []
        if self._is_logging():
            found.append("dirty logging is still on")
        if not await self.goes_on():
            found.append("the guest runs but gets nowhere")
        await machine.pause()
        check = await trio.to_thread.run_sync(guests.check_machine, machine)
        await machine.resume()
        assert check is not None  # a dirtier can be checked
        return found if check.ok else [*found, check.summary]

    def _progress(self) -> int:
        machine = self.machine
        share = dirtier.shares(memory=MEMORY, cpus=1, parameters=machine.description.parameters)[0]
        status = dirtier.read_status(machine.memory, share, [])
        return status.progress if status else 0

    def _is_logging(self) -> bool:
        """KVM refuses to read the log of a memory slot that has none."""
        bitmap = np.zeros(self.machine.memory.n_pages // 64 + 1, np.uint64)
        for region in self.machine.memory.regions:
            try:
                self.machine.vm.get_dirty_log(region.slot, bitmap.data)
            except KvmError as error:
                if error.errno != errno.ENOENT:
                    raise
            else:
                return True
        return False
