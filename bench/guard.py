"""What the guard costs: ``make guard``. The same bytes go through a bare and a guarded TCP channel, in turns.

Both use one connection, in pieces that alternate, so that a busy host slows both down alike: the median
of the pairs' ratios is printed. What is held to the goal is the cost of one call, measured on a channel that
does nothing: what disturbs that can only add to it, so the best of some rounds is taken.
"""

from __future__ import annotations

import argparse
import mmap
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import trio
from rich.console import Console

from kvmmig.transport import AnyChannel, SendChannel, TransportURI, transport_for
from kvmmig.transport.guard import GuardedChannel
from kvmmig.units import format_duration, format_rate

MIB = 1 << 20
PIECE = 64 * MIB
CALLS = 20_000
GOAL = 0.01  # of the throughput

_RECEIVER = """
import mmap, socket, sys
buffer = mmap.mmap(-1, 4 << 20)
with socket.socket(fileno=int(sys.argv[1])) as server:
    sock, _ = server.accept()
    while sock.recv_into(buffer):
        pass
"""


@contextmanager
def receiver() -> Iterator[TransportURI]:
    """A process that takes in whatever comes; yields where."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", _RECEIVER, str(server.fileno())]
        with subprocess.Popen(command, pass_fds=[server.fileno()]) as process:
            try:
                yield TransportURI("tcp", f"127.0.0.1:{server.getsockname()[1]}")
            finally:
                process.kill()


class Nothing(SendChannel):
    """Accepts everything, and has the checkpoint that it must have."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        return len(buffers[0])

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        return


def guarded(channel: AnyChannel) -> GuardedChannel:
    return GuardedChannel(channel, "the transport that is measured")


async def send(channel: SendChannel, memory: memoryview) -> tuple[float, int]:
    """Seconds, and calls, that all of ``memory`` takes."""
    calls = at = 0
    begin = perf_counter()
    while at < len(memory):
        at += await channel.send_some([memory[at : at + channel.call_size]])
        calls += 1
    await channel.flush()
    return perf_counter() - begin, calls


async def over_tcp(pairs: int) -> tuple[float, float, int]:
    """Bytes a second through the bare channel, the guarded one's share of them, and bytes a call."""
    memory = mmap.mmap(-1, PIECE)
    memory.write(bytes(range(256)) * (PIECE // 256))
    bare_times, ratios, calls = [], [], 0
    with receiver() as uri:
        async with transport_for(uri).connect() as channel:
            guard = guarded(channel)
            await send(channel, memoryview(memory))
            for number in range(pairs):
                # Each goes first in every other pair.
                if number % 2:
                    bare, count = await send(channel, memoryview(memory))
                    watched, _ = await send(guard, memoryview(memory))
                else:
                    watched, _ = await send(guard, memoryview(memory))
                    bare, count = await send(channel, memoryview(memory))
                bare_times.append(bare)
                ratios.append(bare / watched)
                calls += count
    return PIECE / statistics.median(bare_times), statistics.median(ratios), PIECE * pairs // calls


async def a_call(rounds: int) -> float:
    """Seconds that the guard adds to one call."""

    async def calls(channel: SendChannel) -> float:
        buffers = [memoryview(bytes(4096))]
        begin = perf_counter()
        for _ in range(CALLS):
            await channel.send_some(buffers)
        return (perf_counter() - begin) / CALLS

    bare = Nothing()
    guard = guarded(bare)
    pairs = [(await calls(bare), await calls(guard)) for _ in range(rounds)]
    return min(with_guard for _, with_guard in pairs) - min(without for without, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="of 64 MiB, bare and guarded")
    arguments = parser.parse_args()
    rate, share, size = trio.run(over_tcp, arguments.pairs)
    call = trio.run(a_call, 9)
    cost = call / (size / rate)
    console = Console()
    console.print(f"TCP through the bare channel   {format_rate(rate)}", highlight=False)
    console.print(f"through the guarded one        {share:.2%} of it, in turns", highlight=False)
    console.print(
        f"the guard's cost of a call     {format_duration(call)}: {cost:.2%} of the {size >> 10} KiB that a "
        f"call moves; below {GOAL:.0%} is the goal: {'reached' if cost < GOAL else 'missed'}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
