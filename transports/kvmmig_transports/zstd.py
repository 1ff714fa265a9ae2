"""``zstd+TRANSPORT:...?zstd.level=3``: compressed on the way, by a thread, from a stable copy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from kvmmig.errors import BadURI, KnobError
from kvmmig.transport import AnyChannel, Knob, Option, PassingChannel, Side, Transport, TransportURI, Wrapper
from kvmmig.transport.toolkit import reframed
from kvmmig.units import Range, parse_count

_LEVELS = Range(1, 19)
_MOST = 4 << 20  # bytes that a frame may hold; a hostile one of a kilobyte could hold a thousand of them


class ZstdWrapper(Wrapper):
    """Compresses what is sent: fewer bytes for more CPU time."""

    summary = "compresses what is sent; both sides have it"
    syntax = "zstd+TRANSPORT:..."
    options = (Option("level", "1 is fast, 19 is small; the source's counts", default="3"),)

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        try:
            self._level = parse_count(self.option("level"), _LEVELS)
        except ValueError as error:
            raise BadURI(f"{str(uri)!r}: zstd.level: {error}") from error
        try:
            import zstandard  # noqa: F401  # found to be missing before there is a channel
        except ModuleNotFoundError as error:
            raise BadURI(
                f"{str(uri)!r}: zstd+ needs zstandard, which is not installed: pip install 'kvmmig[zstd]'"
            ) from error

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        compressor = _Compressor(self._level)
        async with reframed(channel, compressor.compress, _decompress, side=side, name="zstd") as framed:
            yield _Compressed(framed, compressor)


class _Compressor:
    """Compresses piece by piece, at a level that may change between two of them."""

    def __init__(self, level: int) -> None:
        self._given = self._made = 0  # bytes
        self.level = level

    @property
    def level(self) -> int:
        return self._level

    @level.setter
    def level(self, level: int) -> None:
        import zstandard

        self._level = level
        self._compressor = zstandard.ZstdCompressor(level=level)

    @property
    def ratio(self) -> float:
        """Bytes before for one behind; 1 before there are any."""
        return self._given / self._made if self._made else 1.0

    def compress(self, piece: bytes | bytearray) -> bytes:
        frame: bytes = self._compressor.compress(piece)
        self._given += len(piece)
        self._made += len(frame)
        return frame


def _decompress(frame: bytes | bytearray) -> bytes:
    import zstandard

    # It allocates what a frame says that it holds: so that is looked at first.
    size = zstandard.frame_content_size(bytes(frame))
    if not 0 <= size <= _MOST:
        raise ValueError(f"it holds {size} bytes, and may hold {_MOST}")
    data: bytes = zstandard.ZstdDecompressor().decompress(frame)
    return data


class _Compressed(PassingChannel):
    """With a knob for the level, and the ratio among the counters."""

    def __init__(self, below: AnyChannel, compressor: _Compressor) -> None:
        super().__init__(below)
        self._compressor = compressor
        self.knobs: Mapping[str, Knob] = {
            **below.knobs,
            "zstd.level": Knob(lambda: str(compressor.level), self._turn),
        }

    def counters(self) -> dict[str, float]:
        return {**super().counters(), "zstd.ratio": self._compressor.ratio}

    def _turn(self, value: str) -> None:
        try:
            self._compressor.level = parse_count(value, _LEVELS)
        except ValueError as error:
            raise KnobError(f"zstd.level: {error}") from error
