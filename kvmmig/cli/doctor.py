"""``kvmmig doctor``: what this host can do, what is missing, and how to mend it."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter

import trio
from rich.text import Text

from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import console_for_tables, echo_json
from kvmmig.cli.scheduling import SLICE, ask_for_short_slices
from kvmmig.errors import KvmmigError
from kvmmig.guests import find
from kvmmig.kvm import System, abi
from kvmmig.machine import Machine, MachineConfig
from kvmmig.machine.config import available_memory
from kvmmig.units import format_duration, format_size

_NEWER_KERNEL = "use a newer kernel, or another host"
_HELPERS = ("libvirt_iohelper",)
_HELPER_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/lib/libvirt", "/usr/libexec"))
_NARROW = 70  # columns of a terminal
_GUEST_MEMORY = 2 << 20
_GUEST_SECONDS = 10.0
_SYS_USERFAULTFD = 323  # x86-64
_UFFD_USER_MODE_ONLY = 1

#: What kvmmig can't work without: the capability, and what it is for.
_NEEDED = {
    "KVM_CAP_USER_MEMORY": "guest memory",
    "KVM_CAP_SET_TSS_ADDR": "real mode on Intel hosts",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "real mode on Intel hosts",
    "KVM_CAP_EXT_CPUID": "the CPU that the guest sees",
    "KVM_CAP_IRQCHIP": "interrupts",
    "KVM_CAP_PIT2": "the timer",
    "KVM_CAP_PIT_STATE2": "migrating the timer",
    "KVM_CAP_MP_STATE": "migrating a vCPU",
    "KVM_CAP_VCPU_EVENTS": "migrating a vCPU",
    "KVM_CAP_DEBUGREGS": "migrating a vCPU",
    "KVM_CAP_XSAVE": "migrating a vCPU",
    "KVM_CAP_XCRS": "migrating a vCPU",
    "KVM_CAP_GET_TSC_KHZ": "migrating the clock",
    "KVM_CAP_ADJUST_CLOCK": "migrating the clock",
    "KVM_CAP_IMMEDIATE_EXIT": "stopping a guest at any moment",
}
#: What makes it better, and what happens without.
_HELPFUL = {
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2": "without it reading the dirty log holds the guest up for longer",
    "KVM_CAP_DIRTY_LOG_RING": "the dirty log is read as a bitmap anyway",
    "KVM_CAP_TSC_CONTROL": "without it a guest moves only between hosts whose TSCs have one frequency",
    "KVM_CAP_TSC_DEADLINE_TIMER": "guests get no TSC deadline timer",
    "KVM_CAP_KVMCLOCK_CTRL": "a Linux guest may complain about soft lockups after a move",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``ok`` is None where nothing depends on it."""

    what: str
    ok: bool | None
    found: str
    advice: str = ""


def examine(*, as_json: bool) -> int:
    """Print what was found; returns 0 when kvmmig can work here, else 1."""
    findings = [*_kvm(), *_host()]
    findings.append(_real_guest() if all(finding.ok is not False for finding in findings) else _no_guest())
    works = all(finding.ok is not False for finding in findings)
    if as_json:
        echo_json({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=True)
        return 0 if works else 1
    out = console_for_tables()
    marks = {True: Text("ok", "green"), False: Text("missing", "bold red"), None: Text("note", "yellow")}
    rows = [
        (marks[each.ok], each.what, f"{each.found}; {each.advice}" if each.advice else each.found)
        for each in findings
    ]
    columns = (Column(""), Column("WHAT", folds=out.width < _NARROW), Column("FOUND", folds=True))
    out.print(fitted(columns, rows, out))
    out.print(
        "\nkvmmig can work here." if works else "\nkvmmig can't work here until what is missing is mended.",
        style="green" if works else "bold red",
    )
    return 0 if works else 1


def _kvm() -> Iterator[Finding]:
    try:
        system = System.open()
    except KvmmigError as error:
        yield Finding("/dev/kvm", False, str(error))
        return
    with system:
        yield Finding("/dev/kvm", True, f"API version {system.api_version}")
        try:
            system.create_vm().close()
            yield Finding("a VM", True, "can be made")
        except KvmmigError as error:
            yield Finding("a VM", False, str(error))
        for name, purpose in _NEEDED.items():
            there = bool(system.check_extension(getattr(abi, name)))
            yield Finding(name, there, f"for {purpose}", "" if there else _NEWER_KERNEL)
        for name, otherwise in _HELPFUL.items():
            value = system.check_extension(getattr(abi, name))
            if value:
                yield Finding(name, True, f"present ({value})")
            else:
                yield Finding(name, None, f"absent: {otherwise}")
        recommended = system.check_extension(abi.KVM_CAP_NR_VCPUS)
        most = system.check_extension(abi.KVM_CAP_MAX_VCPUS)
        yield Finding("vCPUs a machine", True, f"{recommended} recommended, {most} at most")


def _host() -> Iterator[Finding]:
    memory = available_memory()
    enough = memory > _GUEST_MEMORY
    yield Finding(
        "memory", enough, f"{format_size(memory)} available", "" if enough else "end other programs"
    )
    yield _huge_pages()
    yield _slices()
    yield _userfaultfd()
    yield _direct_io("/var/tmp")
    yield _pipe_size()
    for helper in _HELPERS:
        path = shutil.which(helper, path=_HELPER_PATH)
        yield (
            Finding(helper, True, f"{path}, usable as pipe:PATH?helper={path}")
            if path
            else Finding(helper, None, "not found", "kvmmig's own helper does the same")
        )


def _huge_pages() -> Finding:
    text = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[always]" in text or "[madvise]" in text:
        return Finding("huge pages", True, text)
    advice = "guests run slower; echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    return Finding("huge pages", None, text or "unknown", advice)


def _slices() -> Finding:
    what, got = "the event loop's CPU time", ask_for_short_slices()
    nice = f"nice {got.nice}"
    if not 0 < got.slice <= SLICE:
        advice = "a busy host keeps it waiting longer; Linux 6.12 and newer have slices of a thread's own"
        return Finding(what, None, nice, advice)
    return Finding(what, True, f"in slices of {format_duration(got.slice)}, {nice}")


def _userfaultfd() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        return Finding("userfaultfd", None, f"{os.strerror(ctypes.get_errno())}; nothing needs it yet")
    os.close(fd)
    return Finding("userfaultfd", True, "present")


def _direct_io(directory: str) -> Finding:
    what = f"O_DIRECT in {directory}"
    block = mmap.mmap(-1, mmap.PAGESIZE)  # aligned, as O_DIRECT wants it
    try:
        with tempfile.TemporaryDirectory(dir=directory) as inside:
            fd = os.open(os.path.join(inside, "probe"), os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                os.write(fd, block)
            finally:
                os.close(fd)
    except OSError as error:
        return Finding(what, None, f"{error.strerror}", "files are written through the page cache, slower")
    finally:
        block.close()
    return Finding(what, True, "works")


def _pipe_size() -> Finding:
    text = _read("/proc/sys/fs/pipe-max-size")
    if text.isdigit() and int(text) >= 1 << 20:
        return Finding("pipe size", True, f"up to {format_size(int(text))}")
    return Finding("pipe size", None, text or "unknown", "pipes want 1 MiB: sysctl fs.pipe-max-size=1048576")


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _no_guest() -> Finding:
    return Finding("a real guest", None, "not tried, because of what is missing")


def _real_guest() -> Finding:
    """Run a 64-bit guest at privilege level 3, which is what runs at full speed on every KVM."""
    said = bytearray()
    seconds = 0.0

    async def run() -> int:
        nonlocal seconds
        program = find("hello").program(memory=_GUEST_MEMORY, cpus=1, settings={})
        begin = perf_counter()
        with trio.move_on_after(_GUEST_SECONDS):
            config = MachineConfig(memory=_GUEST_MEMORY, name=program.name)
            async with Machine.open(config, output=said.extend) as machine:
                await machine.load(program)
                await machine.start()
                ending = await machine.wait()
            seconds = perf_counter() - begin
            return ending.status if ending.kind == "exit" else 1
        return 1

    try:
        status = run_to_end(run)
    except KvmmigError as error:
        return Finding("a real guest", False, str(error))
    if status > 128:
        raise SystemExit(status)  # a signal
    if status or not said:
        return Finding("a real guest", False, f"it did not end well in {_GUEST_SECONDS:g} s", _NEWER_KERNEL)
    return Finding("a real guest", True, f"ran at privilege level 3 and ended in {format_duration(seconds)}")
