"""Assembler sources to bytes, by nasm, where it is installed; with errors that name the line.

The built-in guests come assembled, so only who brings a source of their own needs nasm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from kvmmig.errors import BadImage

#: Seconds: a source with an endless %rep must not keep its user waiting for ever.
_PATIENCE = 60.0
_SAYS_BITS = re.compile(r"^\s*\[?\s*bits\b", re.IGNORECASE | re.MULTILINE)
_SAYS_ORIGIN = re.compile(r"^\s*\[?\s*org\b", re.IGNORECASE | re.MULTILINE)
_ERROR = re.compile(r"^(?P<file>.+?):(?P<line>\d+): (?:error|fatal|panic): (?P<what>.*)$", re.MULTILINE)


def assemble(
    source: str,
    *,
    name: str,
    bits: Literal[16, 32, 64] = 16,
    origin: int = 0,
    directory: Path | None = None,
) -> bytes:
    """The machine code of ``source``, which is written in nasm's syntax.

    ``bits`` and ``origin``, the address that its first byte will lie at, hold where the source does not say
    them itself by ``bits`` and ``org``. ``name`` is what errors call the source. Files that it includes are
    looked for in ``directory``. Blocking: it starts a process.

    Raises `BadImage` where there is no nasm, and for an error with the file, the line, its text and what is
    wrong with it.
    """
    nasm = shutil.which("nasm")
    if nasm is None:
        raise BadImage(
            f"{name}: to assemble it takes nasm, which is not installed; install it (apt install nasm, dnf "
            "install nasm), or run what somebody else has assembled: an ELF or a flat image"
        )
    before = []
    if not _SAYS_BITS.search(source):
        before += ["--before", f"bits {bits}"]
    if origin and not _SAYS_ORIGIN.search(source):
        before += ["--before", f"org {origin:#x}"]
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as scratch:
        given, made = Path(scratch, "source.asm"), Path(scratch, "image")
        given.write_text(source, encoding="utf-8")
        # To nasm a mistyped instruction alone on its line is a label. Here a label has its colon.
        command = [nasm, "-w-other", "-w+error=label-orphan", "-f", "bin", *before, "-o", str(made)]
        if directory is not None:
            command += ["-I", f"{directory}/"]
        try:
            done = subprocess.run(
                [*command, str(given)],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            raise BadImage(f"{name}: nasm was not done with it after {_PATIENCE:.0f} s") from error
        except OSError as error:
            raise BadImage(f"{name}: nasm can't be started: {error.strerror}") from error
        if done.returncode:
            raise _bad_source(name, source, str(given), done.stderr)
        return made.read_bytes()


def _bad_source(name: str, source: str, given: str, said: str) -> BadImage:
    found = _ERROR.search(said)
    if found is None:
        return BadImage(f"{name}: nasm can't assemble it: {' '.join(said.split()) or 'it does not say why'}")
    what = found["what"].partition(" [-w")[0].removeprefix("parser: ")
    if found["file"] != given:  # one that it includes
        return BadImage(f"{found['file']}:{found['line']}: {what}")
    number = int(found["line"])
    lines = source.splitlines()
    text = lines[number - 1].strip() if number <= len(lines) else ""
    if text.startswith("#"):
        what += ", for a comment begins with ';'"
    return BadImage(f"{name}:{number}: {what}: {text}" if text else f"{name}:{number}: {what}")
