"""A new guest to begin with: a few files that run as they are, with the guest's name in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from kvmmig.errors import BadConfig, BadImage

_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,47}", re.ASCII)
# For each language: the skeleton's files, and what each is called; one with several has a folder of its own.
_FILES: Mapping[str, Mapping[str, str]] = {
    "asm": {"guest.asm": "NAME.asm"},
    "c": {"guest.c": "NAME/NAME.c", "guest.ld": "NAME/guest.ld", "Makefile": "NAME/Makefile"},
}
LANGUAGES = tuple(_FILES)


def write_skeleton(name: str, language: str, directory: Path) -> list[Path]:
    """Write the files of a new guest, and return their paths; the first one is its source.

    ``language`` is one of `LANGUAGES`. Raises `BadConfig` for a name that is none, and `BadImage` where a
    file is there already, with nothing written, or can't be written.
    """
    if not _NAME.fullmatch(name):
        raise BadConfig(
            f"{name!r} is no name for a guest; use up to 48 letters, digits, - and _, the first a letter "
            "or a digit"
        )
    folder = resources.files(__package__).joinpath("skeletons")
    files = {
        directory / path.replace("NAME", name): folder.joinpath(file).read_text().replace("NAME", name)
        for file, path in _FILES[language].items()
    }
    for path in files:
        if path.exists():
            raise BadImage(f"{path}: it is there already; use another name, or remove it first")
    try:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise BadImage(f"{path}: it can't be written: {error.strerror}") from error
    return list(files)
