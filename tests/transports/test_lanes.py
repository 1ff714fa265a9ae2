"""Lanes: a thread copies, the loop decides; what a cancel leaves is known to the byte."""

from __future__ import annotations

import contextlib
import os
import random
import socket

import pytest
import trio
import trio.testing

from kvmmig.errors import ChannelClosed
from kvmmig.transport.toolkit.lanes import ReceiveLane, SendLane

_DATA = random.Random(3).randbytes((6 << 20) + 13)


def pair() -> tuple[int, int]:
    """Two ends of a connection, as descriptors that do not block."""
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    return ends[0].detach(), ends[1].detach()


async def send_all(lane: SendLane, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(data):
        at += await lane.send_some([view[at : at + 1000], view[at + 1000 :]])
    await lane.wait_idle()


async def test_all_bytes_arrive_in_order_and_the_descriptors_are_closed() -> None:
    near, far = pair()
    sending, receiving = SendLane(near, "there"), ReceiveLane(far, "here")
    got = memoryview(bytearray(len(_DATA)))

    async def send() -> None:
        await send_all(sending, _DATA)
        await sending.end()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            at = 0
            while count := await receiving.receive_some(got[at:] or memoryview(bytearray(1))):
                at += count
        await receiving.end()
    assert got == _DATA
    for fd in (near, far):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


async def test_a_lane_that_nobody_empties_takes_only_so_much() -> None:
    near, far = pair()
    lane, accepted = SendLane(near, "there"), 0
    view = memoryview(_DATA)
    with trio.move_on_after(0.2):  # a slow host only takes less
        while accepted < 64 << 20:
            accepted += await lane.send_some([view])
    assert 0 < accepted <= 4 << 20, "what waits for the thread, and in the kernel, is bounded"
    lane.abort()
    os.close(far)


async def test_a_cancelled_receive_has_taken_nothing_or_says_what() -> None:
    near, far = pair()
    lane, got = ReceiveLane(far, "here"), bytearray()
    buffer = memoryview(bytearray(1 << 20))
    rest = memoryview(_DATA)
    with trio.fail_after(60):
        for pause in range(200):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def receive() -> None:
                        got.extend(buffer[: await lane.receive_some(buffer)])

                    nursery.start_soon(receive)
                    for _ in range(pause % 4):
                        await trio.lowlevel.checkpoint()
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[os.write(near, rest[:50_000]) :]
                    for _ in range(pause % 3):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        os.close(near)
        while count := await lane.receive_some(buffer):
            got.extend(buffer[:count])
    lane.abort()
    assert bytes(got) == _DATA[: len(_DATA) - len(rest)]


async def test_what_breaks_behind_bytes_is_told_after_them() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    far = socket.create_connection(listening.getsockname())
    near, _ = listening.accept()
    far.setblocking(False)
    lane = ReceiveLane(far.detach(), "here")
    near.sendall(b"x" * 100)
    buffer = memoryview(bytearray(1 << 20))
    with trio.fail_after(60):
        assert await lane.receive_some(buffer) == 100
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        near.close()
        with pytest.raises(ConnectionResetError):
            await lane.receive_some(buffer)
    lane.abort()
    listening.close()


async def test_an_abort_wakes_whoever_waits() -> None:
    near, far = pair()
    sending, receiving = SendLane(near, "there"), ReceiveLane(far, "here")
    woken: list[str] = []

    async def receive() -> None:
        with pytest.raises(ChannelClosed, match="here was closed by this side"):
            await receiving.receive_some(memoryview(bytearray(1 << 20)))
        woken.append("receive")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        receiving.abort()
    with pytest.raises(BrokenPipeError), trio.fail_after(60):
        await send_all(sending, _DATA)  # the other side goes with its lane
    sending.abort()
    with pytest.raises(ChannelClosed, match="there was closed by this side"):
        await sending.send_some([memoryview(b"x")])
    assert woken == ["receive"]


async def test_an_end_wakes_whoever_waits_even_for_a_thread_that_has_not_begun() -> None:
    for _ in range(30):
        near, far = pair()
        lane = ReceiveLane(far, "here")

        async def receive(lane: ReceiveLane = lane) -> None:
            with pytest.raises(ChannelClosed):
                await lane.receive_some(memoryview(bytearray(1 << 20)))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.lowlevel.checkpoint()
                await lane.end()
        os.close(near)
