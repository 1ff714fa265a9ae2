#!/usr/bin/env python3
"""Stands where a tool expects a QEMU binary: takes QEMU's command line, and runs a toy guest by kvmmig.

QEMU's own ``QEMUMachine`` and ``guestperf`` are driven with it, unchanged. The guest is the one that
KVMMIG_GUEST names with its options ("dirtier --set hot=64MiB"), or "dirtier"; disks, displays and kernels are
left out.
Usage: as_qemu.py -m 1024 -smp 2 -qmp unix:/tmp/a.qmp,server=on,wait=off [-incoming tcp:0:4444]
"""

from __future__ import annotations

import os
import shlex
import sys

_MONITORS = ("-qmp", "-qmp-pretty")
_ALONE = ("-S", "-nodefaults", "-no-reboot", "-no-shutdown", "-nographic", "-no-user-config", "-enable-kvm")


def main(arguments: list[str]) -> None:
    words = iter(arguments)
    options: dict[str, list[str]] = {}
    for word in words:
        name = word.replace("--", "-", 1) if word.startswith("--") else word
        if name in ("-version", "-v"):
            os.execlp("kvmmig", "kvmmig", "--version")
        options.setdefault(name, []).append("" if name in _ALONE else next(words, ""))
    command = ["kvmmig", "run"]
    if "-incoming" in options:
        command += ["--incoming", options["-incoming"][-1].replace("tcp:0:", "tcp:0.0.0.0:")]
    else:
        command += shlex.split(os.environ.get("KVMMIG_GUEST", "dirtier"))
        command += ["--cpus", options.get("-smp", ["1"])[-1].partition(",")[0]]
        memory = options.get("-m", ["128"])[-1].removeprefix("size=").partition(",")[0]
        command += ["--memory", f"{memory}M" if memory.isdecimal() else memory]
    if "-S" in options:
        command.append("--paused")
    for monitor in _MONITORS:
        for address in options.get(monitor, []):
            # QEMU connects where kvmmig, without a word of it, listens.
            command += ["--qmp", address if "," in address else f"{address},server=off"]
    # One of -chardev and one of -mon are a monitor, too.
    named = dict(word.partition("=")[::2] for mon in options.get("-mon", []) for word in mon.split(","))
    for chardev in options.get("-chardev", []):
        if f"id={named.get('chardev')}" in chardev.split(","):
            command += ["--qmp", chardev]
    if "-name" in options:
        name = options["-name"][-1].removeprefix("guest=").partition(",")[0]
        command += ["--name", name]
    os.execvp(command[0], [*command, "--serial", os.devnull])


if __name__ == "__main__":
    main(sys.argv[1:])
