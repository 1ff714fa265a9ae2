"""Ways of moving bytes that the tests of several transports need."""

from __future__ import annotations

from kvmmig.transport import ReceiveChannel, SendChannel, Transport


async def send_all(channel: SendChannel, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await channel.send_some([view]) :]


async def receive_exactly(channel: ReceiveChannel, count: int) -> bytes:
    got = bytearray()
    buffer = memoryview(bytearray(min(count, 1 << 20)))
    while len(got) < count:
        got += buffer[: await channel.receive_some(buffer[: count - len(got)])]
    return bytes(got)


async def read_all(transport: Transport) -> bytes:
    """What one accept gives, up to its end."""
    got = bytearray()
    buffer = memoryview(bytearray(1 << 20))
    async with transport.listen() as listener, listener.accept() as channel:
        while count := await channel.receive_some(buffer):
            got += buffer[:count]
    return bytes(got)


async def connect(transport: Transport) -> None:
    """Connect, and leave again at once."""
    async with transport.connect() as channel:
        channel.abort()


async def accept(transport: Transport) -> None:
    """Listen, accept, and leave again at once."""
    async with transport.listen() as listener, listener.accept() as channel:
        channel.abort()
