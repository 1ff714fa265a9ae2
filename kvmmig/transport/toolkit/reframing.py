"""The base of wrappers that put the bytes into frames of their own: a compression, a checksum, a cipher.

On the way below, each piece that is accepted is one frame::

    length of what follows: u32, big-endian | encode(piece)

A piece is a copy, so it does not change while it is encoded, although guest memory does. Large pieces are
encoded, and decoded, in a thread.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

import trio

from kvmmig.errors import ChannelBroken
from kvmmig.transport.contract import AnyChannel, ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.pumped import pumped_channel, pumped_receiver, pumped_sender
from kvmmig.transport.wrapper import PassingChannel, Side

Code = Callable[[bytes | bytearray], bytes | bytearray | memoryview]

_HEADER = struct.Struct(">I")
_FRAME_SIZE = 1 << 20
_SLACK = 4096  # bytes by which any code may make a small frame larger
_AT_ONCE = 1 << 14  # bytes that are not worth a thread


@asynccontextmanager
async def reframed(
    below: AnyChannel, encode: Code, decode: Code, *, side: Side, name: str, frame_size: int = _FRAME_SIZE
) -> AsyncIterator[AnyChannel]:
    """A channel around ``below``, for `Wrapper.wrap`; it goes the ways that ``below`` goes on this ``side``.

    ``encode`` makes of at most ``frame_size`` bytes what goes below; ``decode`` makes the same bytes of it
    again, and raises any exception for what is no such thing: then the channel is broken. Each is called by
    one thread at a time, in the order of the stream, so both may keep a state. A frame from the other side
    may have twice ``frame_size`` and 4 KiB, and decode to as much; a longer one breaks the channel before
    anything is allocated for it. ``name`` is the wrapper's, for sentences and counters.

    ``below``'s errors, notices, knobs and counters are passed on; its end is the end of this one.
    """
    frames = _Frames(below, encode, decode, name, 2 * frame_size + _SLACK)
    async with _pumped(frames, side, frame_size) as channel:
        yield _Reframed(channel, frames)


def _pumped(frames: _Frames, side: Side, frame_size: int) -> AbstractAsyncContextManager[AnyChannel]:
    below = frames.below
    peer, close, abort = below.peer, below.aclose, below.abort
    if below.two_way:
        return pumped_channel(
            frames.send,
            frames.receive,
            peer=peer,
            flush=frames.flush,
            close=close,
            abort=abort,
            call_size=frame_size,
        )
    if side is Side.SOURCE:
        return pumped_sender(
            frames.send, peer=peer, flush=frames.flush, close=close, abort=abort, call_size=frame_size
        )
    return pumped_receiver(frames.receive, peer=peer, close=close, abort=abort)


class _Reframed(PassingChannel):
    """``channel``, with what else ``below`` has to say."""

    def __init__(self, channel: AnyChannel, frames: _Frames) -> None:
        super().__init__(channel)
        self._frames = frames
        self.notices = frames.below.notices
        self.binding = frames.below.binding
        self.knobs = frames.below.knobs

    def waits_for(self) -> str:
        return self._frames.below.waits_for()

    def counters(self) -> dict[str, float]:
        return {**self._frames.below.counters(), **self._frames.counters()}


class _Frames:
    """Whole frames over a channel. Each method is called by one task at a time."""

    def __init__(self, below: AnyChannel, encode: Code, decode: Code, name: str, longest: int) -> None:
        self.below = below
        self._encode = encode
        self._decode = decode
        self._name = name
        self._longest = longest
        self._sent = self._received = 0  # bytes below

    async def send(self, piece: bytes) -> None:
        sender = cast(SendChannel, self.below)
        frame = await self._coded(self._encode, piece, "encode")
        if len(frame) > self._longest:
            raise ChannelBroken(f"{self._name}+ makes {len(frame)} bytes of {len(piece)}; that is too much")
        rest = [memoryview(_HEADER.pack(len(frame)))]
        if frame:
            rest.append(memoryview(frame).cast("B"))
        while rest:
            count = await sender.send_some(rest)
            self._sent += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]

    async def flush(self) -> None:
        await cast(SendChannel, self.below).flush()

    async def receive(self) -> bytes | bytearray | memoryview:
        """The next one's piece; an empty one at the end of the stream."""
        while header := await self._read(_HEADER.size, at_start=True):
            (length,) = _HEADER.unpack(header)
            if length > self._longest:
                raise ChannelBroken(
                    f"{self.below.peer} sends a frame of {length} bytes, and {self._name}+ takes "
                    f"{self._longest}; is the other side's URI without {self._name}+?"
                )
            piece = await self._coded(self._decode, await self._read(length), "decode")
            if len(piece) > self._longest:
                raise ChannelBroken(f"a frame from {self.below.peer} decodes to {len(piece)} bytes; too many")
            if piece:
                return piece
        return b""

    def counters(self) -> dict[str, float]:
        return {f"{self._name}.sent-bytes": self._sent, f"{self._name}.received-bytes": self._received}

    async def _read(self, size: int, *, at_start: bool = False) -> bytearray:
        """Exactly ``size`` bytes; none at all if the stream may end here, and does."""
        receiver = cast(ReceiveChannel, self.below)
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = await receiver.receive_some(view)
            if count == 0 and at_start and len(view) == size:
                return bytearray()
            if count == 0:
                raise ChannelBroken(f"the stream from {self.below.peer} ended inside of a frame")
            self._received += count
            view = view[count:]
        return data

    async def _coded(self, code: Code, data: bytes | bytearray, what: str) -> bytes | bytearray | memoryview:
        try:
            if len(data) <= _AT_ONCE:
                return code(data)
            return await trio.to_thread.run_sync(
                code, data, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        except Exception as error:
            raise ChannelBroken(
                f"{self._name}+ can't {what} what goes {'to' if what == 'encode' else 'from'} "
                f"{self.below.peer}: {error or type(error).__name__}"
            ) from error
