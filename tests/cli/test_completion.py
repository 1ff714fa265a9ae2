"""What a shell completes, and how quickly a command begins."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmmig.cli import rundir
from kvmmig.cli.app import cli

from .conftest import Kvmmig


def completions(*words: str) -> list[str]:
    """What bash would be told after these words, the last of which is being typed."""
    environment = {
        "_KVMMIG_COMPLETE": "bash_complete",
        "COMP_WORDS": "kvmmig " + " ".join(words),
        "COMP_CWORD": str(len(words)),
    }
    told = CliRunner().invoke(cli, prog_name="kvmmig", env=environment).output
    return [line.partition(",")[2] for line in told.splitlines() if line]


def test_commands_options_and_guests_are_completed() -> None:
    assert {"restore", "resume", "reset"} <= set(completions("re"))
    assert "--json" in completions("migrate", "--")
    assert "dirtier" in completions("run", "di")


def test_the_names_of_running_machines_are_completed(runtime_directory: Path) -> None:
    assert completions("status", "") == []
    for name in ("alpha", "alps", "beta"):
        rundir.claim(name).files.monitor.touch()
    assert completions("status", "al") == ["alpha", "alps"]
    for command in ("migrate", "save", "cancel", "set", "console", "pause", "resume", "reset", "quit"):
        assert completions(command, "b") == ["beta"], command


def test_names_are_completed_without_importing_what_is_heavy(runtime_directory: Path) -> None:
    script = (
        "import os, sys\nfrom kvmmig.cli import main\n"
        "os.environ.update(_KVMMIG_COMPLETE='bash_complete', COMP_WORDS='kvmmig status ', COMP_CWORD='2')\n"
        "sys.argv = ['kvmmig']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'trio', 'numpy', 'rich', 'msgspec', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_what_the_shell_understands(kvmmig: Kvmmig, shell: str) -> None:
    told = kvmmig("completion", shell)
    assert told.process.returncode == 0
    assert "_KVMMIG_COMPLETE" in told.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=told.stdout, text=True, check=True)


@pytest.mark.slow
def test_help_begins_within_one_and_a_half_times_of_importing_trio() -> None:
    """A measurement: medians of interleaved runs, on a machine that should do nothing else."""
    import statistics
    import time

    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began

    runs = [(seconds("-c", "import trio"), seconds("-m", "kvmmig", "--help")) for _ in range(30)]
    trio, kvmmig = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"import trio {trio * 1000:.0f} ms, kvmmig --help {kvmmig * 1000:.0f} ms: {kvmmig / trio:.2f} times"
    )
    assert kvmmig <= 1.5 * trio
