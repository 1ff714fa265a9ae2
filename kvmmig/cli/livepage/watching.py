"""``kvmmig watch NAME --web``: one machine looked at, its page served."""

from __future__ import annotations

import trio

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.livepage.application import Application
from kvmmig.cli.livepage.history import History
from kvmmig.cli.livepage.looking import Looking
from kvmmig.cli.livepage.server import serving
from kvmmig.cli.livepage.viewers import Viewers
from kvmmig.cli.printing import echo
from kvmmig.cli.remote import machine


def serve_page(name: str, *, port: int, insecure: bool) -> int:
    """Serve the page of a machine until Ctrl-C, also when the machine has ended; returns the exit status.

    Raises `KvmmigError` where there is no such machine, or the port is not to be had.
    """

    async def command() -> int:
        async with machine(name) as client:
            history = History()
            viewers = Viewers(history)
            looking = Looking(client, history, viewers)
            await looking.look()
            async with serving(Application(viewers, insecure=insecure), port) as url:
                echo(url)
                echo("kvmmig: open it in a browser; Ctrl-C ends it", err=True)
                await looking.until_gone()
                echo(f"kvmmig: {name!r} has ended; its page stays until Ctrl-C", err=True)
                await trio.sleep_forever()

    return run_to_end(command)
