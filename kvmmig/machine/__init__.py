"""The tiny virtual machine monitor: a machine's memory, vCPUs, devices and life."""

from __future__ import annotations

from kvmmig.machine.boot import Entry, Program
from kvmmig.machine.config import MachineConfig, MachineDescription
from kvmmig.machine.cpu import Ending, ExitHook
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.machine import Machine
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import State

__all__ = [
    "PAGE_SIZE",
    "DirtyTracker",
    "Ending",
    "Entry",
    "ExitHook",
    "GuestMemory",
    "Machine",
    "MachineConfig",
    "MachineDescription",
    "PageSet",
    "Program",
    "State",
    "StateSection",
]
