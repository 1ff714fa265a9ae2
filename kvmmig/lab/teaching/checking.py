"""Checks a student's file, in a process of its own: ``python -m kvmmig.lab.teaching.checking FOLDER FILE``.

Prints the sentences, each with a NUL behind it. Status 2, with a sentence, where it can't be checked here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from kvmmig.errors import KvmUnavailable
from kvmmig.kvm import System


def main(folder: Path, file: Path) -> None:
    """Check, and print."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the student's code prints is no sentence of the check
    checker = _load(folder / "check.py", "check")
    if checker.NEEDS_KVM:
        try:
            with System.open():
                pass
        except KvmUnavailable as error:
            print(f"this lab can't be checked here: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    try:
        for sentence in checker.check(_load(file, "student")):
            print(sentence, end="\0", file=said)
    except Exception as error:
        print(_where(error, file), end="\0", file=said)
    said.flush()


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _where(error: BaseException, file: Path) -> str:
    """What was raised, and the student's own line that it came from."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file.name}, line {lines[-1].lineno} ({lines[-1].line})" if lines else file.name
    return f"{place} raises {type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).absolute())
