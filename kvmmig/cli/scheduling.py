"""The event loop's thread asks for short slices of CPU time: on a busy host it then runs sooner."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

#: Seconds. What the loop does at a time takes less, and the shorter the slice, the sooner it begins.
SLICE = 0.0001
#: The nice value that it asks for where it was started with none of its own; root may, and RLIMIT_NICE.
NICE = -10

# struct sched_attr of <linux/sched/types.h>, its first version: size, policy, flags, nice, priority, runtime,
# deadline, period. Under SCHED_OTHER the runtime is the slice, in nanoseconds, from Linux 6.12 on.
_ATTR = struct.Struct("=IIQiIQQQ")
# vCPUs, helpers and commands are to have neither the slices nor the nice value: it becomes 0 again.
_RESET_ON_FORK = 1
_SYS_SCHED_SETATTR, _SYS_SCHED_GETATTR = 314, 315  # x86-64
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Scheduling:
    """How a thread is scheduled."""

    #: Seconds; 0 where the kernel, before Linux 6.12, has no slices of a thread's own.
    slice: float
    nice: int


def ask_for_short_slices() -> Scheduling:
    """Ask for them for this thread, and not for those that it makes; returns what it got. Never raises.

    It stays an ordinary thread (SCHED_OTHER), so it takes no more CPU time than others do, but takes it in
    smaller pieces and sooner.
    """
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    flags = _RESET_ON_FORK if nice >= 0 else 0
    for wanted in (nice or NICE, nice):  # who was started by nice(1) stays as that says
        attr = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, flags, wanted, 0, int(SLICE * 1e9), 0, 0)
        if _libc.syscall(_SYS_SCHED_SETATTR, 0, attr, 0) == 0:
            break
    return scheduling()


def scheduling() -> Scheduling:
    """How this thread is scheduled."""
    attr = ctypes.create_string_buffer(_ATTR.size)
    if _libc.syscall(_SYS_SCHED_GETATTR, 0, attr, _ATTR.size, 0):
        return Scheduling(0.0, os.getpriority(os.PRIO_PROCESS, 0))
    _, _, _, nice, _, runtime, _, _ = _ATTR.unpack(attr.raw)
    return Scheduling(runtime / 1e9, nice)
