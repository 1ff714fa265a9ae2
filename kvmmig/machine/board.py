"""The hardware of one machine, put together and taken apart: memory, VM, vCPUs with their threads, devices.

It knows nothing of trio and nothing of a machine's states. Its calls block, if only for ioctls, so a
`Machine` makes them in worker threads; `Board.run` and `Board.park` return at once.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from kvmmig.errors import KvmError, StateMismatch
from kvmmig.kvm import CpuidEntry, System, Vcpu, Vm
from kvmmig.machine import crash
from kvmmig.machine.bios import BiosPort
from kvmmig.machine.config import MachineConfig, MachineDescription, describe
from kvmmig.machine.cpu import Cpu, Ending, ExitHook
from kvmmig.machine.cpuid import for_vcpu
from kvmmig.machine.devices import DebugConsole, ExitPort, KeyboardReset, PortBus, Serial, SystemControlA
from kvmmig.machine.halting import Looker, why_stuck
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.populating import Reserve
from kvmmig.machine.serial import IRQ
from kvmmig.machine.state import Parts
from kvmmig.machine.textscreen import text_screen
from kvmmig.machine.throttle import Throttle

# Intel hosts without "unrestricted guest" keep these pages in guest-physical space: put them into the hole.
_IDENTITY_MAP = 0xFEFFC000
_TSS = 0xFEFFD000
#: How often a vCPU must be found stuck before it counts.
_LOOKS = 2


class Board:
    """``output`` gets what the guest sends; ``on_end`` is told when the guest has come to its end, and
    ``on_room`` when the serial port takes input again; ``on_exit`` is an `ExitHook`. All four are called in
    vCPU threads.

    Built by `build`, whatever part of which was done is undone by `close`.
    """

    memory: GuestMemory
    vm: Vm
    vcpus: Sequence[Vcpu]
    #: How the guest ended by itself. Only the first vCPU to say so is heard.
    ending: Ending | None

    def __init__(
        self,
        config: MachineConfig,
        *,
        output: Callable[[bytes], None],
        on_end: Callable[[], None],
        on_room: Callable[[], None],
        on_exit: ExitHook | None,
    ) -> None:
        self.config = config
        self.vcpus = ()
        self.ending = None
        self._cpus: list[Cpu] = []
        self._stuck: dict[int, tuple[int, str]] = {}
        self._throttle = Throttle(self._cpus)
        self._on_end = on_end
        self._on_exit = on_exit
        self._running_or_ending = threading.Lock()
        self._owned = ExitStack()
        self._system: System
        self.serial = Serial(output, irq=self._serial_irq, on_room=on_room)
        reset = partial(self._end, Ending("reset"))
        self._system_control = SystemControlA(reset)
        self._bios = BiosPort(self._unserved)
        self._bus = PortBus(
            (
                self._bios,
                self.serial,
                DebugConsole(output),
                ExitPort(lambda status: self._end(Ending("exit", status))),
                self._system_control,
                KeyboardReset(reset),
            )
        )

    def build(
        self,
        description: MachineDescription | None,
        reserve: Reserve | None = None,
        contents: Callable[[GuestMemory], None] | None = None,
    ) -> MachineDescription:
        """Create the VM and its vCPUs, each with a parked thread; as described, or of all that this host has.

        Its memory is populated in the background from here on; it is that of ``reserve``, if there is one.
        With ``contents`` it is not populated; they are called with it before there is a VM.
        Returns what a stream's hello is to say of this machine. Raises `BadConfig`, `StateMismatch`,
        `KvmUnavailable`.
        """
        self._system = self._owned.enter_context(System.open())
        held = reserve.size if reserve is not None else 0
        if description is None:
            self.config.check_host(self._system, held)
        else:
            self._check_same(description)
            description.check_fits(self._system, held)
        self.memory = self._bios.memory = GuestMemory(self.config.memory, reserve)
        self._owned.callback(self.memory.close)
        if contents is not None:
            contents(self.memory)

        self.vm = self._owned.enter_context(self._system.create_vm())
        self.vm.set_identity_map_addr(_IDENTITY_MAP)
        self.vm.set_tss_addr(_TSS)
        if self.config.irqchip:
            self.vm.create_irqchip()
            self.vm.create_pit2()
        for region in self.memory.regions:
            address = self.memory.address(region)
            self.vm.set_user_memory_region(region.slot, region.gpa, region.size, address)

        cpuid = description.cpuid if description else self._system.supported_cpuid()
        vcpus: list[Vcpu] = []
        for index in range(self.config.cpus):
            vcpu = self._owned.enter_context(self.vm.create_vcpu(index))
            vcpu.set_cpuid2([CpuidEntry(*entry) for entry in for_vcpu(cpuid, index)])
            if description is not None and description.tsc_khz != vcpu.get_tsc_khz():
                _set_tsc_khz(vcpu, description.tsc_khz)
            vcpus.append(vcpu)
        self.vcpus = tuple(vcpus)

        # Threads come last, so that they are the first to be taken down.
        self._owned.callback(self.end_threads)
        for index, vcpu in enumerate(vcpus):
            self._cpus.append(
                Cpu(
                    index,
                    vcpu,
                    self._bus,
                    on_end=self._end,
                    on_look=self._look_at,
                    on_halt=self._halted,
                    report_crash=self._report_crash,
                    on_exit=self._on_exit,
                )
            )
        self._owned.callback(self._throttle.set, 0.0)
        self._owned.callback(Looker(self.look).end)
        if contents is None:
            self.memory.populate()  # last: it makes threads and mappings that begin meanwhile wait
        return description or describe(
            self.config, cpuid, vcpus[0].get_tsc_khz(), _readable_msrs(self._system, vcpus[0])
        )

    @property
    def thread_ids(self) -> Sequence[int]:
        """The kernel's ids of the vCPUs' threads, in the order of the vCPUs; empty once they have ended."""
        return tuple(cpu.thread_id for cpu in self._cpus if cpu.thread_id is not None)

    @property
    def exits(self) -> Counter[str]:
        """How often the vCPUs, all of them together, left the guest."""
        return sum((Counter(cpu.exits) for cpu in self._cpus), Counter())

    def run(self) -> None:
        """Let all vCPUs run. No effect on a guest that has ended, even if nobody knows it yet."""
        with self._running_or_ending:  # a guest that ends at once must find all vCPUs running, to park them
            self._stuck.clear()
            if self.ending is None:
                for cpu in self._cpus:
                    cpu.run()

    def throttle(self, share: float) -> None:
        """Let all vCPUs stand still for ``share`` of the time."""
        self._throttle.set(share)

    def look(self) -> None:
        """Have all vCPUs looked at, in their threads: is there one that can still do something?

        If none can, in this look and the one before, the guest ends, as `MachineConfig.on_halt` has it.
        """
        for cpu in self._cpus:
            cpu.look()

    def park(self) -> None:
        """Ask all vCPUs to leave the guest."""
        for cpu in self._cpus:
            cpu.park()

    def wait_parked(self) -> None:
        """Block until all vCPUs are out of the guest, with no port or memory access half done."""
        for cpu in self._cpus:
            cpu.wait_parked()

    def end_threads(self) -> None:
        """End the vCPUs' threads for good, and block until they have. Idempotent."""
        for cpu in self._cpus:
            cpu.quit()
        for cpu in self._cpus:
            cpu.join()

    def close(self) -> None:
        """Take everything down: threads, vCPUs, VM, memory, in this order. Idempotent."""
        self._owned.close()

    def parts(self, description: MachineDescription) -> Parts:
        """What has state."""
        return Parts(
            vm=self.vm,
            vcpus=self.vcpus,
            irqchip=self.config.irqchip,
            msrs=description.msrs,
            serial=self.serial,
            system_control=self._system_control,
        )

    def _end(self, ending: Ending) -> None:
        with self._running_or_ending:
            if self.ending is None:
                self.ending = ending
            self.park()
        self._on_end()

    def _unserved(self, what: str) -> None:
        self._end(Ending("crash", report=f"{what}{text_screen(self.memory)}"))

    def _look_at(self, cpu: Cpu) -> None:
        why = why_stuck(cpu.vcpu, self.memory, irqchip=self.config.irqchip)
        times, _ = self._stuck.get(cpu.index, (0, ""))
        self._note_stuck(cpu, why, times + 1)

    def _halted(self, cpu: Cpu) -> None:
        regs, sregs = cpu.vcpu.get_regs(), cpu.vcpu.get_sregs()
        where = crash.place(regs, sregs)
        why = f"it has halted at {where}, and without an interrupt controller nothing can wake it"
        self._note_stuck(cpu, why, _LOOKS)

    def _note_stuck(self, cpu: Cpu, why: str | None, times: int) -> None:
        with self._running_or_ending:
            if why is None:
                self._stuck.pop(cpu.index, None)
                return
            # Twice, for one may have been woken by another that has halted since.
            self._stuck[cpu.index] = (times, why)
            if len(self._stuck) < len(self._cpus) or any(seen < _LOOKS for seen, _ in self._stuck.values()):
                return
            _, why = self._stuck[0]
        if self.config.on_halt == "end":
            self._end(Ending("halted", report=why + text_screen(self.memory)))

    def _serial_irq(self, level: bool) -> None:
        if self.config.irqchip:
            self.vm.irq_line(IRQ, level)

    def _report_crash(self, cpu: Cpu, what: str) -> str:
        text = crash.report(cpu.index, self.config.cpus, cpu.vcpu, self.memory, what)
        return text + text_screen(self.memory)

    def _check_same(self, description: MachineDescription) -> None:
        described = description.config()
        for what in ("memory", "cpus", "irqchip"):
            if getattr(described, what) != getattr(self.config, what):
                raise StateMismatch(
                    f"the source's machine has {what} = {getattr(described, what)}, and this one is to have "
                    f"{getattr(self.config, what)}; build it from the description"
                )


def _set_tsc_khz(vcpu: Vcpu, khz: int) -> None:
    try:
        vcpu.set_tsc_khz(khz)
    except KvmError as error:
        raise StateMismatch(
            f"the guest's clock (TSC) runs at {khz} kHz and this host's CPU can only give it "
            f"{vcpu.get_tsc_khz()} kHz; move it to a host of the same frequency"
        ) from error


def _readable_msrs(system: System, vcpu: Vcpu) -> list[int]:
    """KVM lists some MSRs that a vCPU with this CPUID has not got; those hold no state."""
    readable = []
    for index in system.msr_index_list():
        try:
            vcpu.get_msrs([index])
        except KvmError:
            continue
        readable.append(index)
    return readable
