"""The command line. Only `main` is here: it stands guard while everything else is being imported."""

from __future__ import annotations


def main() -> int:
    """Run the command that ``sys.argv`` names; returns its exit status."""
    try:
        from kvmmig.cli.app import run_command

        return run_command()
    except KeyboardInterrupt:
        return 130  # what a shell makes of SIGINT
