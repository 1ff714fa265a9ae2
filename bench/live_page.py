"""Does a page that is looked at slow the monitor down? ``python -m bench.live_page``

A guest moves over TCP at a bounded rate, and a client asks ``query-migrate`` every millisecond, as in
`bench/monitor_latency.py`: in turns without a page, and with ``kvmmig watch --web``, 20 plain readers of its
stream and, where one is installed, a headless Chromium that draws it. The answers should be no worse then.
Readers and the browser are on this host, so they take CPU time away from the machine as well; ``stolen`` is
only what this host's hypervisor took.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.monitor_latency import Answers, Monitor, machine, poll, where_it_listens
from kvmmig.units import format_duration, format_rate


def read_streams(url: str, count: int) -> None:
    """Read the page's stream ``count`` times at once, for ever."""

    def read() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", "/events")
        response = connection.getresponse()
        while response.readline():
            pass

    for _ in range(count):
        threading.Thread(target=read, daemon=True).start()
    threading.Event().wait()


@contextmanager
def looked_at(directory: Path, readers: int) -> Iterator[None]:
    """The page of the machine ``here``, and all who look at it."""
    with ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[bytes]:
            environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=quiet)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        page = start(sys.executable, "-m", "kvmmig", "watch", "here", "--web")
        assert page.stdout is not None
        url = page.stdout.readline().decode().strip()
        start(sys.executable, "-m", "bench.live_page", "--read", url, "--readers", str(readers))
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser:
            sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
            home = f"--user-data-dir={directory / 'browser'}"
            start(
                browser, *sandbox, "--headless=new", "--disable-gpu", home, "--remote-debugging-port=0", url
            )
        yield


def measure(directory: Path, memory: str, rate: str, readers: int | None) -> Answers:
    """One migration; where ``readers`` is a number, with the page."""
    with ExitStack() as stack:
        there = stack.enter_context(machine(directory, "there", "--incoming", "tcp:127.0.0.1:0"))
        guest = ("dirtier", "--memory", memory, "--set", "hot=64MiB", "--set", "pace=30000")
        here = stack.enter_context(machine(directory, "here", *guest))
        monitor = stack.enter_context(Monitor(here))
        if readers is not None:
            stack.enter_context(looked_at(directory, readers))
        poll(monitor, 3.0)  # the browser has started
        monitor("migrate", uri=f"throttle+{where_it_listens(there)}?throttle.rate={rate}")
        return poll(monitor)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast the monitor answers while its page is looked at.")
    parser.add_argument("--memory", default="1GiB", help="the guest's, such as 1GiB")
    parser.add_argument("--rate", default="200MB/s", help="how fast it moves, such as 200MB/s")
    parser.add_argument("--readers", type=int, default=20, help="who read the stream besides the browser")
    parser.add_argument("--times", type=int, default=2, help="how often each is measured")
    parser.add_argument("--read", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_streams(options.read, options.readers)
        return
    table = Table(title=f"query-migrate, asked every millisecond; {options.memory} at {options.rate}")
    for column in ("page", "answers", "median", "p99", "p99.9", "worst", "stolen", "rate", "ended"):
        table.add_column(column, justify="left" if column in ("page", "ended") else "right")
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as directory:
        for readers in [None, options.readers] * options.times:
            found = measure(Path(directory), options.memory, options.rate, readers)
            table.add_row(
                "none" if readers is None else f"{readers} readers, a browser",
                str(len(found.took)),
                *(format_duration(found.quantile(q)) for q in (0.5, 0.99, 0.999, 1.0)),
                format_duration(found.stolen),
                format_rate(found.figures["sent-bytes"] / found.figures["total-time"]),
                found.status,
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
