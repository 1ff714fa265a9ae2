"""A machine: its parts, and what can be done with it in each state of its life."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Self, TypeVar

import msgspec
import trio

from kvmmig.errors import WrongState
from kvmmig.kvm import Vcpu, Vm
from kvmmig.machine import boot, state
from kvmmig.machine.board import Board
from kvmmig.machine.config import MachineConfig, MachineDescription
from kvmmig.machine.cpu import Ending, ExitHook
from kvmmig.machine.dirty import BitmapTracker, DirtyTracker
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.populating import Reserve
from kvmmig.machine.serial import Serial
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import COMMANDS, State

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a reset goes back to: the program, and the state of everything else right after its load."""

    program: boot.Program
    sections: Sequence[StateSection]


class Machine:
    """A virtual machine with its memory, vCPUs and devices. Made by `Machine.open`.

    Commands that come at the same time are carried out one after the other. One that the present state does
    not allow raises `WrongState` and changes nothing; one that leads where the machine already is does
    nothing. A cancel takes effect while a command waits for its turn, never half way through it.
    """

    def __init__(
        self, config: MachineConfig, output: Callable[[bytes], None], on_exit: ExitHook | None
    ) -> None:
        """Use `open`."""
        #: What it was made from.
        self.config = config
        #: What a stream's hello says of this machine.
        self.description: MachineDescription
        self._board = Board(
            config,
            output=output,
            on_end=lambda: self._from_thread(self._note_end),
            on_room=lambda: self._from_thread(self._wake_feeders),
            on_exit=on_exit,
        )
        self._token = trio.lowlevel.current_trio_token()
        self._lock = trio.Lock()
        # Its own: threads that others have lost to a dead disk must not keep a guest from being paused.
        self._limiter = trio.CapacityLimiter(2)
        self._state = State.CREATED
        self._on_state: list[Callable[[State], None]] = []
        self._loaded: _Loaded | None = None
        self._ending: Ending | None = None
        self._ended = trio.Event()
        self._room = trio.Event()
        self._captured = False  # what is typed now is not in the state that was captured

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: MachineConfig,
        *,
        output: Callable[[bytes], None] | None = None,
        on_exit: ExitHook | None = None,
        description: MachineDescription | None = None,
        reserve: Reserve | None = None,
        contents: Callable[[GuestMemory], None] | None = None,
    ) -> AsyncIterator[Self]:
        """Build a machine, and close it at the end of the block, whatever happens in it.

        ``output`` gets what the guest sends to the serial port and the debug console. ``on_exit`` serves
        ports and other exits of your own: it gets each `kvmmig.kvm.Exit` before anybody else, and returns
        None for what is not its own, else what the guest reads, ``b""`` for a write; what it keeps is no part
        of the guest's state. Both are called in vCPU threads and must not block. With a ``description`` the
        machine is built just as the source's, which ``config`` must agree with. Its memory is that of
        ``reserve``, if there is one; what is not populated yet is populated in the background. With
        ``contents`` it is not: they are called with it, in a thread, to fill it or to map it from somewhere.

        Raises `BadConfig`, `StateMismatch`, `KvmError`. A cancel, or an error, leaves nothing behind.
        """
        machine = cls(config, output or (lambda data: None), on_exit)
        try:
            board = machine._board
            machine.description = await machine._in_thread(board.build, description, reserve, contents)
            yield machine
        finally:
            with trio.CancelScope(shield=True):
                await machine.aclose()

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    def on_state(self, listener: Callable[[State], None]) -> None:
        """Have ``listener`` called with each new state, on the event loop; it must be quick and not raise.

        The moment that a reset holds a running guest is not told.
        """
        self._on_state.append(listener)

    def _go_to(self, after: State) -> None:
        if after is not self._state:
            self._state = after
            for listener in self._on_state:
                listener(after)

    @property
    def memory(self) -> GuestMemory:
        """The guest's RAM."""
        return self._board.memory

    @property
    def vm(self) -> Vm:
        """The VM's file descriptor."""
        return self._board.vm

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs' file descriptors, to be looked at while the machine is paused."""
        return self._board.vcpus

    @property
    def serial(self) -> Serial:
        """COM1. To type at it, use `feed`."""
        return self._board.serial

    @property
    def thread_ids(self) -> Sequence[int]:
        """The kernel's ids of the vCPUs' threads, as in proc(5); empty once they have ended."""
        return self._board.thread_ids

    @property
    def exits(self) -> Counter[str]:
        """How often its vCPUs, all of them together, left the guest, by the names of `kvmmig.kvm.exits`."""
        return self._board.exits

    # Commands

    async def load(self, program: boot.Program) -> None:
        """Put a program into memory, ready to start. Raises `BadImage`, `BadConfig`, `KvmError`."""
        async with self._lock:
            self._check("load")
            cpuid = self.description.cpuid
            await self._in_thread(boot.load, program, self.config, self.memory, self.vcpus, cpuid)
            parameters = {**self.description.parameters, **program.parameters}
            self.description = msgspec.structs.replace(self.description, parameters=parameters)
            sections = await self._in_thread(state.capture, self._board.parts(self.description))
            self._loaded = _Loaded(program, sections)

    async def start(self) -> None:
        """Let the guest run, for the first time or again."""
        async with self._lock:
            self._run("start")

    async def resume(self, *, force: bool = False) -> None:
        """Let a paused guest run again.

        ``force`` does so even after it has moved away. Only an operator can know that it does not run there.
        """
        async with self._lock:
            self._run("resume by force" if force else "resume")

    async def pause(self) -> None:
        """Stop all vCPUs; they are out of the guest when this returns, with no access half done.

        No effect on one that is paused. Raises `WrongState` for one that has not been started, has moved away
        or has ended, also when it ends by itself at that very moment.
        """
        async with self._lock:
            self._check("pause")
            with trio.CancelScope(shield=True):
                await self._park()
            self._note_end()
            self._go_to(self._check("pause"))

    async def reset(self) -> None:
        """Begin again as after `load`: memory zeroed, the program in it, vCPUs and devices as they were then.

        A guest that runs goes on running, from its start; a paused one stays paused. Takes as long as zeroing
        the memory, which a cancel waits for. Raises `WrongState` for a guest that came with captured state:
        its program is not here. After any other error the guest is paused, and fit only to be ended. Not to
        be used while a migration runs, which would miss what is zeroed.
        """
        async with self._lock:
            self._check("reset")
            loaded = self._loaded
            if loaded is None:
                raise WrongState(
                    f"can't reset {self.config.name!r}: no program was loaded here, as for a guest that came "
                    "by migration; start its program anew instead"
                )
            with trio.CancelScope(shield=True):
                await self._reset(loaded)

    async def _reset(self, loaded: _Loaded) -> None:
        before = self._state
        if before is State.RUNNING:
            await self._park()
            self._note_end()
            self._check("reset")
            self._state = State.PAUSED
        await self.memory.clear()
        cpuid = self.description.cpuid
        # Whatever mode the guest has left its vCPUs in, loading begins where it began the first time.
        await self._in_thread(state.apply, self._board.parts(self.description), loaded.sections)
        await self._in_thread(boot.load, loaded.program, self.config, self.memory, self.vcpus, cpuid)
        if before is State.RUNNING:
            self._run("resume")

    async def end(self) -> None:
        """End the guest, and its vCPUs' threads with it. Its memory and registers can still be looked at."""
        async with self._lock:
            after = self._check("end")
            with trio.CancelScope(shield=True):
                await self._park()
                self._note_end()
                await self._in_thread(self._board.end_threads)
            self._go_to(after)
            self._set_ending(Ending("ended"))

    def mark_moved(self) -> None:
        """The other side has the guest now: it never runs here by itself again. For a migration's "go"."""
        self._go_to(self._check("mark moved"))
        self._set_ending(Ending("moved"))

    async def wait(self) -> Ending:
        """Wait until the guest ends, by itself or by a command, or moves. All vCPUs are parked by then."""
        while self._ending is None:
            await self._ended.wait()
        ending = self._ending
        await self._in_thread(self._board.wait_parked)
        return ending

    async def feed(self, data: bytes) -> None:
        """Type at the guest's serial port, waiting for room there. A cancel may leave any part of it typed.

        A paused guest takes as much as the port has room for, and has it with it wherever it goes. From
        `capture` on nothing is taken, which would be lost there, until it is known where the guest runs.
        """
        await trio.lowlevel.checkpoint()
        while data:
            self._check("feed")
            if not self._captured:
                data = data[self.serial.feed(data) :]
            if data:
                await self._room.wait()

    async def capture(self) -> list[StateSection]:
        """The paused machine's state, all but its memory. Raises `KvmError` that names the section.

        `feed` waits from here on, until the guest runs again or `forget_capture`.
        """
        async with self._lock:
            self._check("capture")
            self._captured = True
            return await self._in_thread(state.capture, self._board.parts(self.description))

    async def forget_capture(self) -> None:
        """The guest goes on, or stays paused, here: what is typed is taken again."""
        await trio.lowlevel.checkpoint()
        self._take_input()

    async def throttle(self, share: float) -> None:
        """Let the vCPUs stand still for ``share`` (0 to 0.99) of the time, in 10 ms slices; 0 undoes it."""
        await self._in_thread(self._board.throttle, share)

    async def while_parked(self, call: Callable[[], T]) -> T:
        """``call()`` in a thread, while no vCPU is in the guest; one that runs goes on right afterwards.

        Nobody is told that it stood still, so be short. A cancel waits for it.
        """
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._park()
                try:
                    result = await self._in_thread(call)
                finally:
                    self._note_end()
                    if self._state is State.RUNNING:
                        self._board.run()
        return result

    def dirty_tracker(self) -> DirtyTracker:
        """A new tracker of the pages that the guest and its devices write; not started yet."""
        return BitmapTracker(self.vm, self.memory)

    def section_sizes(self) -> Mapping[str, int]:
        """The state sections that `apply` wants: their names, and the most bytes that each can have."""
        return state.section_sizes(self._board.parts(self.description))

    async def apply(self, sections: Iterable[StateSection], *, leave_out: Collection[str] = ()) -> None:
        """Take over captured state instead of loading a program: the guest is paused, as it was captured.

        The sections named in ``leave_out``, such as ``{"cpu0/xsave"}``, stay as a new machine has them: for
        finding out what a guest does without. They may be missing in ``sections``.

        Raises `StateMismatch` or `KvmError`. After an error the machine is fit only to be closed.
        """
        async with self._lock:
            after = self._check("apply")
            parts = self._board.parts(self.description)
            await self._in_thread(state.apply, parts, list(sections), frozenset(leave_out))
            self._go_to(after)

    async def aclose(self) -> None:
        """Take everything down, in order: threads, vCPUs, VM, memory. Idempotent; `open` calls it."""
        async with self._lock:
            after = self._check("close")
            try:
                with trio.CancelScope(shield=True):
                    await self._in_thread(self._board.close)
            finally:
                self._note_end()
                self._go_to(after)
                self._set_ending(Ending("ended"))

    def _check(self, command: str) -> State:
        """The state that a command leads to. Raises `WrongState`."""
        allowed = COMMANDS[command]
        if self._state in allowed:
            return allowed[self._state]
        hint = (
            "resume it by force only if it does not run on the other side"
            if self._state is State.MOVED
            else f"that works only while it {' or '.join(allowed)}"
        )
        raise WrongState(f"can't {command} {self.config.name!r}: the guest {self._state}; {hint}")

    def _run(self, command: str) -> None:
        after = self._check(command)
        if self._state is State.MOVED:
            self._ending, self._ended = None, trio.Event()
        self._go_to(after)
        self._board.run()
        self._take_input()

    # What vCPU threads tell, on the event loop

    def _from_thread(self, call: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):  # nobody is left who could want to know
            self._token.run_sync_soon(call)

    def _note_end(self) -> None:
        if self._state is State.RUNNING and self._board.ending is not None:
            self._go_to(State.ENDED)
            self._set_ending(self._board.ending)

    def _take_input(self) -> None:
        self._captured = False
        self._wake_feeders()

    def _wake_feeders(self) -> None:
        self._room.set()
        self._room = trio.Event()

    def _set_ending(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
            self._ended.set()
            self._wake_feeders()

    async def _park(self) -> None:
        self._board.park()
        await self._in_thread(self._board.wait_parked)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)
