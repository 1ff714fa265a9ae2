"""How fast ``tls+`` is, beside what one core can encrypt: ``make tls``. In one run, in turns; medians.

``openssl speed`` says how many bytes a second one core encrypts with the cipher that the two sides agree
upon. What kvmmig does is measured in these ways, each in turns with it:

- *sealed*, *opened*: what the threads with the cipher do, copies in and out of OpenSSL included, without any
  I/O and by the CPU's time, as is OpenSSL's figure above them: a busy host changes little;
- *encrypts*: this process sends through ``tls+tcp:`` to one that throws the encrypted bytes away, so only one
  side's cipher runs, as where the two sides are two hosts;
- *both sides*: to another process on this host that decrypts, so the ciphers, the copies and both ends of the
  TCP connection share this host's cores;
- *plain*: the same bytes through ``tcp:`` alone.
"""

from __future__ import annotations

import argparse
import os
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, thread_time

import trio
import trustme
from rich.console import Console

from kvmmig.transport import SendChannel, Side, TransportURI, transport_for
from kvmmig.units import format_rate
from kvmmig_transports.tlscredentials import load
from kvmmig_transports.tlssession import Session

MIB = 1 << 20
GOAL = 0.6  # of what one core encrypts

_CIPHERS = {"TLS_AES_256_GCM_SHA384": "aes-256-gcm", "TLS_AES_128_GCM_SHA256": "aes-128-gcm"}
_RECORD = 16384  # bytes, as TLS has them

# Takes what comes to its URI, and decrypts it unless it is told to leave it as it is.
_RECEIVER = """
import sys, trio
from contextlib import asynccontextmanager
from kvmmig.transport import PassingChannel, transport_for
import kvmmig_transports.tls as tls

if sys.argv[2] == "as it is":
    @asynccontextmanager
    async def tls_channel(session, below):
        yield PassingChannel(below)
    tls.tls_channel = tls_channel

async def main():
    buffer = memoryview(bytearray(4 << 20))
    async with transport_for(sys.argv[1]).listen() as listener:
        print(listener.uri.target, flush=True)
        async with listener.accept() as channel:
            while await channel.receive_some(buffer):
                pass

trio.run(main)
"""


def make_certificates(where: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(where / "ca-cert.pem"))
    for side in ("server", "client"):
        made = ca.issue_cert("127.0.0.1")
        made.cert_chain_pems[0].write_to_path(str(where / f"{side}-cert.pem"))
        key = where / f"{side}-key.pem"
        key.touch(0o600)
        made.private_key_pem.write_to_path(str(key))


@contextmanager
def receiver(uri: TransportURI, how: str) -> Iterator[TransportURI]:
    """A process that takes in whatever comes; yields where."""
    command = [sys.executable, "-c", _RECEIVER, str(uri), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            target = process.stdout.readline().strip()
            yield TransportURI(uri.scheme, target, uri.options, uri.wrappers)
        finally:
            process.kill()


async def send(channel: SendChannel, memory: memoryview) -> float:
    """Bytes a second, all of them flushed."""
    at, begin = 0, perf_counter()
    while at < len(memory):
        at += await channel.send_some([memory[at : at + channel.call_size]])
    await channel.flush()
    return len(memory) / (perf_counter() - begin)


def one_core(cipher: str, *more: str) -> float:
    """Bytes a second that OpenSSL's own program encrypts, by the CPU's time; ``-elapsed``: by the clock."""
    command = ["openssl", "speed", *more, "-seconds", "1", "-bytes", str(_RECORD), "-evp", cipher]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"([0-9.]+)k\s*$", said)
    assert found is not None, said
    return float(found[1]) * 1000


def shaken_hands(directory: Path) -> tuple[str, Session, Session]:
    """The cipher that both sides agree upon, the source and the destination."""
    names = set[str]()

    def shake(tls: ssl.SSLObject) -> None:
        tls.do_handshake()
        names.add((tls.cipher() or ("",))[0])

    source, destination = (
        Session(load(str(directory), side, mutual=True, name_is_checked=False), server=server, host="")
        for side, server in ((Side.SOURCE, False), (Side.DESTINATION, True))
    )
    flight = source.attempt(shake).outgoing
    flight = destination.attempt(shake, flight).outgoing
    flight = source.attempt(shake, flight).outgoing
    destination.attempt(shake, flight)
    (name,) = names
    return name, source, destination


def alone(source: Session, destination: Session, memory: memoryview) -> tuple[float, float]:
    """Bytes a second of the CPU's time that a thread seals, and opens, without any I/O."""
    sealing = opening = 0.0
    out = memoryview(bytearray(4 * MIB))
    for at in range(0, len(memory), MIB):
        begin = thread_time()
        sealed = source.seal([memory[at : at + MIB]])
        middle = thread_time()
        destination.open(sealed, out)
        sealing, opening = sealing + middle - begin, opening + thread_time() - middle
    return len(memory) / sealing, len(memory) / opening


class Shares:
    """Speeds, and their shares of what one core does, round by round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rates: dict[str, list[float]] = {}
        self._shares: dict[str, list[float]] = {}

    def add(self, what: str, rate: float, core: float) -> None:
        self._rates.setdefault(what, []).append(rate)
        self._shares.setdefault(what, []).append(rate / core)

    def share(self, what: str) -> float:
        return statistics.median(self._shares[what])

    def print(self) -> None:
        for what, rates in self._rates.items():
            rate = format_rate(statistics.median(rates))
            self._console.print(f"{what:34} {rate:>10}  {self.share(what):5.0%}", highlight=False)


async def measure(rounds: int, size: int, console: Console) -> None:
    memory = memoryview(os.urandom(size))
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make_certificates(Path(directory))
        tls = TransportURI("tcp", "127.0.0.1:0", {"tls.dir": directory}, ("tls",))
        name, source, destination = shaken_hands(Path(directory))
        cipher = _CIPHERS[name]
        where = {
            "encrypts, for another host": stack.enter_context(receiver(tls, "as it is")),
            "both sides on this host": stack.enter_context(receiver(tls, "decrypted")),
            "plain tcp:, both sides": stack.enter_context(receiver(TransportURI("tcp", "127.0.0.1:0"), "")),
        }
        shares = Shares(console)
        async with AsyncExitStack() as channels:
            connected = {
                what: await channels.enter_async_context(transport_for(uri).connect())
                for what, uri in where.items()
            }
            for channel in connected.values():
                await send(channel, memory)
            for _ in range(rounds):
                core = one_core(cipher)
                shares.add(f"openssl's {cipher}, CPU time", core, core)
                sealed, opened = alone(source, destination, memory[: 64 * MIB])
                shares.add("sealed by a thread, CPU time", sealed, core)
                shares.add("opened by a thread, CPU time", opened, core)
                core = one_core(cipher, "-elapsed")
                shares.add(f"openssl's {cipher}, by the clock", core, core)
                for what, channel in connected.items():
                    shares.add(what, await send(channel, memory), core)
    shares.print()
    reached = shares.share("encrypts, for another host") >= GOAL
    said = "reached" if reached else "missed"
    console.print(f"{GOAL:.0%} by the clock is the goal: {said}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mebibytes", type=int, default=256, help="sent in each round, by each way")
    arguments = parser.parse_args()
    trio.run(measure, arguments.rounds, arguments.mebibytes * MIB, Console())


if __name__ == "__main__":
    main()
