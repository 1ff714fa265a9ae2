"""The destination of a trial, a process of its own.

``python -m kvmmig.lab.experiments.destination URI RECORD`` prints where it listens, takes one guest in,
and lets it run until it is killed.
"""

from __future__ import annotations

import sys

import trio

from kvmmig.errors import KvmmigError
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.transport import TransportURI


async def receive(uri: str, record: str) -> None:
    """Take a guest in."""

    def listening(real: TransportURI) -> None:
        print(real, flush=True)

    async with IncomingMigration(uri, on_listening=listening, record=record).machine() as machine:
        await machine.wait()


if __name__ == "__main__":
    try:
        trio.run(receive, sys.argv[1], sys.argv[2])
    except* KvmmigError as errors:
        sys.exit(str(errors.exceptions[0]))
