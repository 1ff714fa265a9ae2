"""A guest that comes by migration: from "listen there" to "it is here"."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal, TypeAlias

import trio

from kvmmig.errors import KvmmigError
from kvmmig.machine import Machine
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.transport import Listener

ArrivalStatus: TypeAlias = Literal["setup", "active", "completed", "failed"]


class Arrival:
    """One guest's arrival, and what is known of it."""

    def __init__(
        self,
        listener: Listener,
        *,
        output: Callable[[bytes], None] | None,
        on_populate: Callable[[int, int], None] | None,
        on_status: Callable[[ArrivalStatus], None],
        on_here: Callable[[Machine], None],
    ) -> None:
        """Owns ``listener``. ``on_status`` is called on the loop whenever `status` changes; ``on_here`` when
        the guest is here, before its source is told so: who hears it from there finds it here.
        """
        #: Where it listens in fact: with the port that the kernel chose.
        self.uri = listener.uri
        self.status: ArrivalStatus = "setup"
        #: What the user should know although it is no error.
        self.notices: tuple[str, ...] = ()
        #: What it failed with.
        self.error: KvmmigError | None = None
        #: The receiving side's figures, once a source has connected.
        self.figures: IncomingMigration | None = None
        self._listener = listener
        self._output = output
        self._on_populate = on_populate
        self._on_status = on_status
        self._on_here = on_here
        self._ended = trio.Event()

    @property
    def active(self) -> bool:
        """It has neither come to its end nor failed."""
        return not self._ended.is_set()

    async def wait(self) -> None:
        """Wait until the guest is here. Raises what its arrival failed with."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    @asynccontextmanager
    async def machine(self) -> AsyncIterator[Machine]:
        """Wait for a source, and take its guest in; it runs if it ran there. Call it once.

        Raises as `IncomingMigration.machine` does.
        """
        async with AsyncExitStack() as stack:
            try:
                async with self._listener as listener:
                    channel = await listener.accept()
                self.notices = channel.notices
                self.figures = IncomingMigration(
                    channel, output=self._output, on_populate=self._on_populate, on_here=self._note_here
                )
                self._enter("active")
                machine = await stack.enter_async_context(self.figures.machine())
            except KvmmigError as error:
                self.error = error
                self._ended.set()
                self._enter("failed")
                raise
            yield machine

    def _note_here(self, machine: Machine) -> None:
        self._ended.set()
        self._enter("completed")
        self._on_here(machine)

    def _enter(self, status: ArrivalStatus) -> None:
        self.status = status
        self._on_status(status)
