"""What the guard costs: ``make guard`` (some seconds).

How much longer a call takes through the guard than without it, on a channel that does nothing but its
checkpoint, beside the time that a plain blocking loop takes to send what one call moves: 512 KiB of memory
that is in no cache, over TCP to another thread. Limit: 1 % of it.
"""

from __future__ import annotations

import os
import socket
import statistics
import threading
from collections.abc import Sequence
from time import perf_counter

import trio

from kvmmig.transport import SendChannel
from kvmmig.transport.guard import GuardedChannel

CALL = 512 << 10  # bytes: what the toolkit's sockets take at a time
CALLS = 2000
MEMORY = 512  # MiB that are sent from: as with a guest, more than any cache holds
RUNS = 15


class Nothing(SendChannel):
    """Accepts all."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        return len(buffers[0])

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        pass

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def one_call(channel: SendChannel) -> float:
    """Seconds."""
    buffers = [memoryview(bytearray(CALL))]
    begin = perf_counter()
    for _ in range(CALLS):
        await channel.send_some(buffers)
    return (perf_counter() - begin) / CALLS


async def extra() -> float:
    """Seconds that the guard adds to a call: the median over runs that alternate."""
    bare = Nothing()
    guarded = GuardedChannel(bare, "nothing")
    return statistics.median([-await one_call(bare) + await one_call(guarded) for _ in range(RUNS)])


def plain_send() -> float:
    """Seconds that one send of `CALL` bytes takes in a blocking loop."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
    ):
        theirs, _ = server.accept()

        def drain() -> None:
            buffer = bytearray(CALL)
            while theirs.recv_into(buffer):
                pass

        reader = threading.Thread(target=drain)
        reader.start()
        memory = memoryview(bytearray(os.urandom(1 << 20)) * MEMORY)
        begin = perf_counter()
        for call in range(CALLS):
            at = call * CALL % len(memory)
            ours.sendall(memory[at : at + CALL])
        took = perf_counter() - begin
        ours.shutdown(socket.SHUT_WR)
        reader.join()
        theirs.close()
    return took / CALLS


def main() -> None:
    added, plain = trio.run(extra), plain_send()
    share = added / plain
    verdict = "reached" if share <= 0.01 else "missed"
    print(f"the guard adds {added * 1e6:.1f} us to a call")
    print(f"a plain send of {CALL >> 10} KiB takes {plain * 1e6:.0f} us")
    print(f"that is {share:.2%} (limit 1 %: {verdict})")


if __name__ == "__main__":
    main()
