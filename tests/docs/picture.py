"""``make picture``: record docs/migration.svg, a terminal in which a guest moves while it runs.

The commands are real, and so is all that stands there; rich draws it. The migration is slowed down, so that
there is something of it to be seen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.cli.screens import Screen

PICTURE = Path(__file__).parents[2] / "docs/migration.svg"
_WIDTH = 80
_COLORS = {"default": "", "brown": "yellow"}


def record() -> str:
    """The picture, as SVG."""
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        shown = Console(record=True, width=_WIDTH, file=StringIO(), force_terminal=True)

        def show(*arguments: str, at: Callable[[str], bool] | None = None) -> None:
            screen = Screen(Path(folder))
            try:
                shown.print(Text.assemble(("$ ", "bold green"), "kvmmig ", " ".join(arguments)))
                screen.run(*arguments)
                if at is not None:
                    screen.wait_for(at)
                    shown.print(drawn(screen), end="")
                screen.end()
                shown.print(drawn(screen))
            finally:
                screen.close()

        try:
            show("run", "dirtier", "--name", "a", "-m", "256MiB", "--set", "hot=8MiB", "-d")
            show("run", "--incoming", "tcp:127.0.0.1:4444", "--name", "b", "-d")
            show("ls")
            show("migrate", "a", "tcp:127.0.0.1:4444", "--bandwidth", "100MB/s", at=half_way)
            show("ls")
        finally:
            for name in ("a", "b"):
                subprocess.run(
                    [sys.executable, "-m", "kvmmig", "quit", name], capture_output=True, check=False
                )
        return shown.export_svg(title="kvmmig")


def half_way(text: str) -> bool:
    """Whether a screen shows a migration of which there is something to be seen."""
    shown = re.search(r"(\d+) %", text)
    return "round" in text and shown is not None and int(shown[1]) >= 50


def drawn(screen: Screen) -> Text:
    """What stands on a terminal, in its colours."""
    text = Text()
    for row in screen.cells():
        for letters, color, bold in row:
            text.append(letters, f"{'bold ' if bold else ''}{_COLORS.get(color, color)}".strip())
        text.append("\n")
    return text


if __name__ == "__main__":
    PICTURE.write_text(record())
    print(f"recorded {PICTURE}")
