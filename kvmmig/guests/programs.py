"""From what a user names to a program: a toy guest, an .asm, an ELF, a flat image."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from kvmmig.errors import BadConfig, BadImage
from kvmmig.guests.toy import available, find
from kvmmig.machine import bios
from kvmmig.machine.boot import Entry, Program
from kvmmig.units import format_size

_ELF = b"\x7fELF"


def find_program(
    what: str, *, entry: str | None = None, memory: int, cpus: int, settings: Mapping[str, int | str]
) -> Program:
    """The program for a machine with ``memory`` bytes. A toy guest's name goes before a file's.

    ``entry`` is a flat image's `Entry`; ``settings`` are a toy guest's, as `ToyGuest.program` takes them.
    Blocking: it reads a file, and may assemble it. Raises `BadImage` and `BadConfig`.
    """
    if entry is not None and entry not in set(Entry):
        raise BadConfig(f"entry {entry!r}: a program starts in {', '.join(Entry)}")
    names = [guest.name for guest in available()]
    if what in names or what.endswith(".asm") or not os.path.exists(what):
        guest = find(what)
        if guest.entry is None and not settings:
            image = guest.assembled()
            return Program(guest.name, _entry(what, image, entry), image)
        if entry is not None and guest.entry is not None and entry != guest.entry:
            raise BadConfig(
                f"--entry {entry}: {what} starts in {guest.entry}, as its source says; leave it out"
            )
        return guest.program(memory=memory, cpus=cpus, settings=settings)
    if settings:
        name, value = next(iter(settings.items()))
        raise BadConfig(f"{name}={value}: {what} is not a toy guest, so it has no parameters to be set")
    image = _read(what, memory)
    return Program(os.path.basename(what), _entry(what, image, entry), image)


def _read(path: str, memory: int) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise BadImage(f"{path}: it is not a regular file; name a guest, an .asm, an ELF or a flat image")
        if found.st_size > memory and not _is_elf(path):
            raise BadImage(
                f"{path}: it has {format_size(found.st_size)} and the guest {format_size(memory)} of memory; "
                "give it more memory"
            )
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"{path}: it can't be read: {error.strerror}") from error


def _is_elf(path: str) -> bool:
    with open(path, "rb") as file:  # one with debug sections may well be larger than what it loads
        return file.read(len(_ELF)) == _ELF


def _entry(path: str, image: bytes, entry: str | None) -> Entry:
    if entry is not None:
        return Entry(entry)
    if image.startswith(_ELF):
        return Entry.ELF
    if bios.is_disk(image):
        return Entry.REAL16
    raise BadImage(
        f"{path}: it is neither an ELF nor a boot sector, so say how it starts: --entry real16 "
        '(at 0x7c00) or --entry long64 (at 1 MiB); in Python, entry="real16"'
    )
