"""The house is built as it is drawn: imports point down, and no file is too long to be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "kvmmig", ROOT / "transports/kvmmig_transports"]
MOST_LINES = 400
#: Longer files, each with the reason: a table is read by looking things up in it, not from top to bottom.
LONGER: dict[str, str] = {}


def modules() -> list[Path]:
    return sorted(path for source in SOURCES for path in source.rglob("*.py"))


def test_imports_keep_the_contracts_in_pyproject() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_of_modules_is_a_package_or_its_imports_would_go_unchecked() -> None:
    assert [str(path) for path in modules() if not (path.parent / "__init__.py").exists()] == []


def test_a_module_is_short_enough_to_be_read_unless_it_is_a_table() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    longer = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert longer.keys() == LONGER.keys(), longer
