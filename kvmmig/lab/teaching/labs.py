"""The labs that there are, and a student's copy of one.

A lab is a folder: README.md (the handout), student.py (with gaps, but it runs), check.py, solution.py,
TEACHER.md, and what else the student is given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kvmmig.errors import KvmmigError

#: In a wheel the folders are beside this package, in a checkout with the other examples.
_PLACES = (Path(__file__).parent / "folders", Path(__file__).parents[3] / "examples/labs")
_NOT_FOR_STUDENTS = ("solution.py", "check.py", "TEACHER.md", "__pycache__")
#: In a student's copy: which lab it is of.
_MARK = ".kvmmig-lab"
#: Seconds that a check may take: a student's loop may be endless.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Lab:
    """One lab."""

    number: int
    folder: Path

    @property
    def title(self) -> str:
        """The first line of its handout."""
        with (self.folder / "README.md").open(encoding="utf-8") as handout:
            return handout.readline().lstrip("# ").strip()


def labs() -> list[Lab]:
    """All of them, by number."""
    place = next((place for place in _PLACES if place.is_dir()), None)
    if place is None:
        raise KvmmigError("the labs' folders are not installed with this kvmmig")
    return sorted(
        (
            Lab(int(folder.name.removeprefix("lab").split("_")[0]), folder)
            for folder in place.iterdir()
            if (folder / "README.md").exists()
        ),
        key=lambda lab: lab.number,
    )


def find_lab(number: int) -> Lab:
    """The lab of that number. Raises `KvmmigError` where there is none."""
    there = labs()
    for lab in there:
        if lab.number == number:
            return lab
    raise KvmmigError(f"there is no lab {number}; there are {', '.join(str(lab.number) for lab in there)}")


def start_lab(lab: Lab, directory: Path) -> None:
    """Copy what a student is given into a new directory. Raises `KvmmigError` where that can't be."""
    try:
        shutil.copytree(lab.folder, directory, ignore=shutil.ignore_patterns(*_NOT_FOR_STUDENTS))
        (directory / _MARK).write_text(f"{lab.number}\n")
    except FileExistsError:
        raise KvmmigError(
            f"{directory} is there already, and nothing in it is touched; name a new one"
        ) from None
    except OSError as error:
        raise KvmmigError(f"the lab can't be copied to {directory}: {error.strerror or error}") from error


def check_lab(directory: Path) -> list[str]:
    """What is still wrong in a student's copy: sentences, none where all is right.

    The student's code runs in a process of its own, for 120 s at most. Raises `KvmmigError` for what is no
    such copy, and where the check needs what is not there.
    """
    try:
        lab = find_lab(int((directory / _MARK).read_text()))
    except (OSError, ValueError):
        raise KvmmigError(f"{directory} was not made by: kvmmig lab start") from None
    return check_file(lab, directory / "student.py")


def check_file(lab: Lab, student: Path) -> list[str]:
    """The same of one file."""
    command = [sys.executable, "-m", "kvmmig.lab.teaching.checking", str(lab.folder), str(student)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            cwd=student.parent,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"{student.name} had not come to its end after {_PATIENCE:g} s: is there a loop without one?"]
    if done.returncode == 2:
        raise KvmmigError(done.stderr.strip())
    if done.returncode:
        return [
            f"{student.name} ended the whole process (status {done.returncode}): {done.stderr.strip()[-500:]}"
        ]
    return done.stdout.split("\0")[:-1]
