"""The command line. Only `main` is here: it stands guard while everything else is being imported."""

from __future__ import annotations

import os


def main() -> int:
    """Run the command that ``sys.argv`` names; returns its exit status."""
    # numpy's linear algebra, which nothing here uses, would start a thread for each CPU.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from kvmmig.cli.app import run_command

        return run_command()
    except KeyboardInterrupt:
        return 130  # what a shell makes of SIGINT
