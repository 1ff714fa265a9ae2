"""The layout of an image, and its checks.

All numbers are little-endian; every part begins at a multiple of 4096 and is filled up with zeros to one::

    0             "kvmimg\\r\\n" | version u32 | length u32 | identity 16 bytes | check 16 bytes | manifest
    MEMORY_AT     memory: page n of the guest, in RAM order, at MEMORY_AT + 4096 n; pages of zeros are holes
    behind it     page map: a bit for each page, set where the file has data for it
                  digests: for each block of 64 pages (256 KiB) an XXH3 u64, 0 where its word of the map is 0
                  state: the machine's state sections, as MessagePack

The manifest is JSON of ``length`` bytes (`Header`): the machine, where each part is, how long the file is,
and an XXH3-128 of the page map, of the digests and of the state. ``check`` is an XXH3-128 of all that comes
before it and of the manifest. The identity, 16 random bytes, seeds every digest. So what is torn, truncated,
edited, or put together from two images does not pass. The checks are against accidents: they are no
signatures, and whoever wants to forge an image can.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from kvmmig import stream
from kvmmig.errors import ImageError

PAGE_SIZE = stream.PAGE_SIZE
MAGIC = b"kvmimg\r\n"
VERSION = 1
#: Memory begins here: where a host may map it with huge pages.
MEMORY_AT = 2 << 20
#: Pages that have a digest together: a word of the page map.
BLOCK_PAGES = 64
BLOCK_SIZE = BLOCK_PAGES * PAGE_SIZE
_HEAD = struct.Struct("<8sII16s16s")
HEAD_SIZE = _HEAD.size
_UNCHECKED = 16  # the check itself, at the head's end

_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
_Digest = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
Words: TypeAlias = npt.NDArray[np.uint64]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An image's manifest. ``size`` is the file's, in bytes; ``saved_at`` seconds since 1970."""

    n_pages: _Number
    data_pages: _Number  # those that the file has data for
    running: bool  # whether the guest ran
    saved_by: Annotated[str, msgspec.Meta(max_length=200)]
    saved_at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    size: _Number
    state_size: _Number
    page_map: _Digest
    digests: _Digest
    state: _Digest
    machine: msgspec.Raw  # JSON that is the machine's own


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of an image of ``n_pages`` pages are, in bytes."""

    n_pages: int

    @property
    def n_blocks(self) -> int:
        return -(-self.n_pages // BLOCK_PAGES)

    @property
    def page_map_at(self) -> int:
        return MEMORY_AT + self.n_pages * PAGE_SIZE

    @property
    def digests_at(self) -> int:
        return self.page_map_at + padded(self.n_blocks * 8)

    @property
    def state_at(self) -> int:
        return self.digests_at + padded(self.n_blocks * 8)

    def size(self, state_size: int) -> int:
        """The whole file's."""
        return self.state_at + padded(state_size)


def padded(size: int) -> int:
    """Up to the next multiple of a page."""
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def seed_of(identity: bytes) -> int:
    return xxhash.xxh3_64_intdigest(identity)


def digest_of(part: bytes | memoryview, seed: int) -> str:
    return xxhash.xxh3_128_hexdigest(part, seed=seed)


def block_digest(block: memoryview, seed: int) -> int:
    """Of one block of memory; never 0, which says that there is none."""
    return xxhash.xxh3_64_intdigest(block, seed=seed) or 1


def encode_head(header: Header, identity: bytes) -> bytes:
    """The file's beginning, padded. Raises `ImageError` where it is longer than its place."""
    manifest = msgspec.json.encode(header)
    if HEAD_SIZE + len(manifest) > MEMORY_AT:
        raise ImageError(f"the machine's description has {len(manifest)} bytes, too many for an image's head")
    blank = _HEAD.pack(MAGIC, VERSION, len(manifest), identity, bytes(16))
    check = xxhash.xxh3_128_digest(blank[:-_UNCHECKED] + manifest)
    data = blank[:-_UNCHECKED] + check + manifest
    return data + bytes(padded(len(data)) - len(data))


def manifest_length(head: bytes) -> int:
    """What ``head``, the first `HEAD_SIZE` bytes, says. Raises `ImageError` where they begin no image."""
    if not head.startswith(MAGIC):
        raise ImageError("it is no image of a guest")
    if len(head) < HEAD_SIZE:
        raise ImageError(f"it has {len(head)} bytes: it was cut")
    _, version, length, _, _ = _HEAD.unpack(head)
    if version != VERSION:
        raise ImageError(
            f"it is an image of version {version}, and only version {VERSION} is understood here; restore it "
            "with the kvmmig that has saved it"
        )
    if length > MEMORY_AT - HEAD_SIZE:
        raise ImageError("its head is damaged")
    return int(length)


def decode_head(head: bytes, manifest: bytes) -> tuple[Header, bytes]:
    """The manifest, checked, and the image's identity. Raises `ImageError`."""
    _, _, _, identity, check = _HEAD.unpack(head)
    if xxhash.xxh3_128_digest(head[:-_UNCHECKED] + manifest) != check:
        raise ImageError("its head is damaged: the check does not fit")
    try:
        header = msgspec.json.decode(manifest, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(f"its manifest makes no sense: {error}") from error
    if not 0 < header.n_pages <= stream.MAX_PAGES or header.n_pages % BLOCK_PAGES:
        raise ImageError(f"it names {header.n_pages} pages, and no guest has so many")
    if header.state_size > stream.MAX_STATE or header.size != Layout(header.n_pages).size(header.state_size):
        raise ImageError("its manifest makes no sense: the sizes do not fit together")
    return header, identity


def encode_state(sections: list[stream.Section]) -> bytes:
    return msgspec.msgpack.encode(sections)


def decode_state(data: bytes) -> list[stream.Section]:
    """Raises `ImageError`."""
    try:
        return msgspec.msgpack.decode(data, type=list[stream.Section])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(f"its machine state makes no sense: {error}") from error
