"""The blocks of commands in the documents: which there are, which are run, and why the others are not.

A block of ``sh`` can be pasted as it is. One of ``console`` shows commands behind ``$``, and what they print.
Each is run, page by page and in its order, unless the line above it says ``<!-- not run: WHY -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"^\$ ?", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block; ``why`` it is not run is empty where it is."""

    page: Path
    line: int
    why: str
    commands: str


def blocks(page: Path) -> Iterator[Block]:
    """Those of one page that have commands."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        shown = found["text"]
        if _COMMAND.match(shown):
            lines = re.findall(r"^\$ (.*(?:\\\n.*)*)$", shown, re.MULTILINE)
        elif found["language"] in ("sh", "console") or shown.startswith("kvmmig "):
            lines = shown.splitlines()
        else:
            continue
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found["why"] or "", "\n".join(lines) + "\n")


def script(page: Path) -> str:
    """All that is run of a page, for one bash; it ends with the first command that fails, and says which."""
    parts = [f"# line {block.line}\n{block.commands}" for block in blocks(page) if not block.why]
    return "set -eEx -o pipefail\n" + "\n".join(parts)
