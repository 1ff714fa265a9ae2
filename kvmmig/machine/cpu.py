"""One vCPU's thread: it runs the guest, serves its port accesses, and parks when asked.

A thread is asked to park by `immediate_exit` and a signal (the *kick*). It blocks every signal, so no handler
is ever installed and trio may run in any thread; only inside KVM_RUN the kick is let through, where it ends
the call and stays pending until the parking thread takes it off.
"""

from __future__ import annotations

import enum
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvmmig.errors import KvmmigError
from kvmmig.kvm import (
    Exit,
    Hlt,
    Interrupted,
    IoIn,
    IoOut,
    MmioRead,
    MmioWrite,
    SystemEvent,
    Vcpu,
)
from kvmmig.kvm.abi import KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN
from kvmmig.machine import crash
from kvmmig.machine.devices import PortBus

KICK = signal.SIGRTMIN

#: Asked first about every exit from the guest, in the vCPU's thread, where it must not block. It returns None
#: for what is not its own. Else it has served it: the guest goes on, and a read gets what it returned.
ExitHook = Callable[[Exit], bytes | None]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a guest ended.

    ``exit``: by itself, with ``status``. ``halted``: it does nothing any more, and nothing can change that;
    ``report`` says why. ``reset``: it asked for a reset, and there is none here. ``crash``: ``report`` is a
    block of text for people. ``ended``: by command. ``moved``: it lives elsewhere now.
    """

    kind: Literal["exit", "halted", "reset", "crash", "ended", "moved"]
    status: int = 0
    report: str = ""

    def __str__(self) -> str:
        words = {
            "exit": f"it exited with status {self.status}",
            "halted": "it halted for good",
            "reset": "it asked for a reset",
            "crash": "it crashed",
            "ended": "a command ended it",
            "moved": "it has moved away",
        }
        return words[self.kind]


class _Wanted(enum.Enum):
    RUN = enum.auto()
    PARK = enum.auto()
    QUIT = enum.auto()


class Cpu:
    """One vCPU with its thread, parked at first. Every method but `wait_parked` and `join` returns at once.

    ``on_end`` is called in the thread when the guest has come to its end; it must `park` every vCPU, this one
    included. ``on_look`` is called there after `look`, with the vCPU out of the guest, and ``on_halt`` when
    it has halted where nothing can wake it. ``report_crash`` makes the text for what no guest survives, from
    this vCPU and one sentence.
    """

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        bus: PortBus,
        on_end: Callable[[Ending], None],
        on_look: Callable[[Cpu], None],
        on_halt: Callable[[Cpu], None],
        report_crash: Callable[[Cpu, str], str],
        on_exit: ExitHook | None,
    ) -> None:
        self.index = index
        self.vcpu = vcpu
        #: How often it left the guest, by the names of `kvmmig.kvm.exits`; written by its thread alone.
        self.exits: dict[str, int] = {}
        self._bus = bus
        self._on_end = on_end
        self._on_look = on_look
        self._on_halt = on_halt
        self._report_crash = report_crash
        self._on_exit = on_exit
        self._changed = threading.Condition()
        self._wanted = _Wanted.PARK
        self._parked = True
        self._held_until = 0.0
        self._look_wanted = False
        vcpu.set_signal_mask(signal.valid_signals() - {KICK})
        self._thread = threading.Thread(target=self._main, name=f"kvmmig vCPU {index}", daemon=False)
        # The thread inherits this mask, so there is no moment at which a kick could kill the process.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of the thread; None once it has ended."""
        return self._thread.native_id if self._thread.is_alive() else None

    def run(self) -> None:
        """Let the guest run. Only for a thread that is parked, see `wait_parked`; no effect after `quit`."""
        with self._changed:
            if self._wanted is _Wanted.PARK:
                self._wanted = _Wanted.RUN
                self._parked = False
                self._changed.notify_all()

    def park(self) -> None:
        """Ask the thread to leave the guest, with no port or memory access half done."""
        self._ask(_Wanted.PARK)

    def quit(self) -> None:
        """Ask the thread to end. No effect on one that has."""
        self._ask(_Wanted.QUIT)

    def _ask(self, wanted: _Wanted) -> None:
        with self._changed:
            if self._wanted in (wanted, _Wanted.QUIT):
                return
            self._wanted = wanted
            self._changed.notify_all()
            if not self._parked:
                self._kick()

    def hold(self, seconds: float) -> None:
        """Let the guest stand still for so long from now on, unless it is parked, or is to be."""
        with self._changed:
            if self._wanted is _Wanted.RUN:
                self._held_until = time.monotonic() + seconds
                self._kick()

    def look(self) -> None:
        """Have ``on_look`` called in the thread soon, unless it is parked, or is to be."""
        with self._changed:
            if self._wanted is _Wanted.RUN:
                self._look_wanted = True
                self._kick()

    def _kick(self) -> None:
        self.vcpu.request_immediate_exit = True
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, KICK)

    def wait_parked(self) -> None:
        """Block until the thread is out of the guest: 0.1 to 0.25 ms after `park`. Not for the event loop."""
        with self._changed:
            self._changed.wait_for(lambda: self._parked)

    def join(self) -> None:
        """Block until the thread has ended. Not for the event loop."""
        self._thread.join()

    def _main(self) -> None:
        while self._wait_to_run():
            try:
                self._run()
            except KvmmigError as error:
                self._crash(str(error))
            except BaseException as error:  # a device's sink: nobody else could ever hear of it
                self._crash(f"serving it failed here ({type(error).__name__}: {error})")

    def _crash(self, what: str) -> None:
        self._on_end(Ending("crash", report=self._report_crash(self, what)))

    def _wait_to_run(self) -> bool:
        with self._changed:
            while self._wanted is not _Wanted.RUN:
                _take_kicks()
                self._parked = True
                self._changed.notify_all()
                if self._wanted is _Wanted.QUIT:
                    return False
                self._changed.wait()
            self.vcpu.request_immediate_exit = False
        return True

    def _stand_still(self) -> None:
        with self._changed:
            left = self._held_until - time.monotonic()
            if left > 0:
                self._changed.wait_for(lambda: self._wanted is not _Wanted.RUN, timeout=left)
            _take_kicks()
            if self._wanted is _Wanted.RUN:  # else it is to be let out at once
                self.vcpu.request_immediate_exit = False

    def _halt(self) -> None:
        """Wait until the thread is to leave the guest, which then is just before its hlt once more."""
        regs = self.vcpu.get_regs()
        regs.rip -= 1
        self.vcpu.set_regs(regs)
        self._on_halt(self)
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not _Wanted.RUN)

    def _is_served(self, hook: ExitHook, exit_: Exit) -> bool:
        """Has the hook served this exit?"""
        answer = None if isinstance(exit_, Interrupted) else hook(exit_)
        if answer is not None and isinstance(exit_, IoIn | MmioRead):
            self.vcpu.complete_in(answer)
        return answer is not None

    def _run(self) -> None:
        vcpu, bus, exits = self.vcpu, self._bus, self.exits
        vcpu.kvmclock_ctrl()
        while True:
            exit_ = vcpu.run()
            name = type(exit_).__name__
            exits[name] = exits.get(name, 0) + 1
            if self._on_exit is not None and self._is_served(self._on_exit, exit_):
                continue
            match exit_:
                case IoOut(port, size, data):
                    bus.write(port, size, data)
                case IoIn(port, size, count):
                    vcpu.complete_in(bus.read(port, size, count))
                case Interrupted():
                    # Only here: an exit on the way to parking is served, and its access completed.
                    if self._wanted is not _Wanted.RUN:
                        return
                    if self._look_wanted:
                        self._look_wanted = False
                        self._on_look(self)
                    self._stand_still()
                case MmioRead(_, size):
                    vcpu.complete_in(b"\xff" * size)
                case MmioWrite():
                    pass  # as on a bus where nobody listens
                case Hlt():  # only without an irqchip, so nothing could ever wake it
                    self._halt()
                case SystemEvent(type=kind) if kind == KVM_SYSTEM_EVENT_RESET:
                    self._on_end(Ending("reset"))
                case SystemEvent(type=kind) if kind == KVM_SYSTEM_EVENT_SHUTDOWN:
                    self._on_end(Ending("exit"))
                case other:
                    self._crash(crash.say(other))


def _take_kicks() -> None:
    """Take pending kicks off this thread; real-time signals queue, so there may be several."""
    while signal.sigtimedwait((KICK,), 0) is not None:
        pass
