"""A guest comes back from an image: mapped where there is a file, else read in order.

Mapped, it runs before its pages have been read: they come when they are used. Its head, its tables and its
state were checked by then; of its memory each block is checked when it is read ahead. Read in order, through
a pipe or a wrapper, all of it is checked before it runs.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import trio

from kvmmig import image, stream
from kvmmig.errors import ChannelBroken, ImageError, KvmmigError, StateMismatch
from kvmmig.image.format import MEMORY_AT, PAGE_SIZE, manifest_length
from kvmmig.image.opened import ImageInOrder
from kvmmig.image.reading import is_image, open_image
from kvmmig.kvm import System
from kvmmig.machine.config import MachineDescription
from kvmmig.machine.cpu import ExitHook
from kvmmig.machine.machine import Machine
from kvmmig.machine.mapping import OwnPages, map_file
from kvmmig.machine.pageset import pages_of, runs_of
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import State
from kvmmig.migration.conversation import Conversation
from kvmmig.migration.welcome import Welcome
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.toolkit import own_tasks

_log = logging.getLogger(__name__)
#: What is zero stays anonymous, with huge pages. So many mappings at most: a process may have 65,530.
_MOST_MAPPINGS = 4096
_CHUNK_BLOCKS = 64  # 16 MiB: what a thread reads ahead in one go
_RECEIVED = 4 << 20


@dataclass(frozen=True, slots=True)
class Restored:
    """What was found: an image, and its file where it can be mapped."""

    image: image.OpenImage
    fd: int | None

    @property
    def zero_pages(self) -> int:
        """Pages that the image has no data for."""
        return self.image.header.n_pages - self.image.header.data_pages


async def look_for_image(channel: GuardedChannel, decoder: stream.Decoder) -> Restored | None:
    """The image that begins here; None where a stream does, whose first bytes ``decoder`` then has.

    Raises `ImageError`, and what the channel raises.
    """
    if channel.two_way:
        return None
    if channel.file is not None:
        opened = await trio.to_thread.run_sync(_open_file, channel.file, abandon_on_cancel=True)
        return None if opened is None else Restored(opened, channel.file)
    begin = await receive(channel, len(image.MAGIC))
    if begin != image.MAGIC:
        room = decoder.buffer()
        room[: len(begin)] = begin
        decoder.advance(len(begin))
        return None
    head = begin + await receive(channel, image.HEAD_SIZE - len(begin))
    manifest = await receive(channel, manifest_length(head))
    return Restored(ImageInOrder(head, manifest), None)


async def receive(channel: GuardedChannel, size: int) -> bytes:
    """``size`` bytes; fewer where the end comes first."""
    data = memoryview(bytearray(size))
    done = await _receive_into(channel, data)
    return bytes(data[:done])


@asynccontextmanager
async def restored_machine(
    found: Restored,
    conversation: Conversation,
    welcome: Welcome,
    *,
    output: Callable[[bytes], None] | None,
    on_exit: ExitHook | None,
) -> AsyncIterator[Machine]:
    """The machine with its guest in it, yet to be started. It is closed at the end of the block.

    Raises `ImageError`, `StateMismatch`, `KvmError`, `BadConfig`, and what the channel raises.
    """
    header = found.image.header
    description = MachineDescription.decode(bytes(header.machine))
    if header.n_pages * PAGE_SIZE != description.memory:
        raise ImageError(f"it has {header.n_pages} pages, but a machine of {description.memory} bytes")
    welcome.check_guest(description)
    await trio.to_thread.run_sync(_check_fits, description)
    fd = found.fd
    if fd is None:
        contents = None
    else:
        runs = _mapped_runs(found.image)
        contents = partial(map_file, fd=fd, at=MEMORY_AT, runs=runs)
    opening = Machine.open(
        description.config(),
        output=output,
        on_exit=on_exit,
        description=description,
        contents=contents,
    )
    async with opening as machine:
        if fd is None:
            assert isinstance(found.image, ImageInOrder)
            await conversation.work(partial(_receive_memory, found.image, conversation.channel, machine))
        sizes = machine.section_sizes()
        for section in found.image.sections:
            if len(section.data) > sizes.get(section.name, len(section.data)):
                raise StateMismatch(
                    f"the state section {section.name!r} has {len(section.data)} bytes; it can have "
                    f"{sizes[section.name]} at most"
                )
        await machine.apply(
            StateSection(section.name, section.version, section.data) for section in found.image.sections
        )
        yield machine


@asynccontextmanager
async def reading_ahead(
    found: Restored, machine: Machine, progress: Callable[[int, int], None] | None
) -> AsyncIterator[None]:
    """While the block lasts, read what the guest has not used yet, check it, and make it the guest's own.

    Then it needs the file no more. Where a block turns out to be damaged the guest is paused, and the log
    says so. ``progress`` gets bytes done and in all.
    """
    if found.fd is None:
        yield
        return
    fd = os.dup(found.fd)
    async with AsyncExitStack() as stack:
        stack.callback(os.close, fd)
        tasks = await stack.enter_async_context(own_tasks())
        tasks.start_soon(_read_ahead, found.image, fd, machine, progress)
        yield


async def _read_ahead(
    opened: image.OpenImage, fd: int, machine: Machine, progress: Callable[[int, int], None] | None
) -> None:
    blocks = (pages_of(_mapped_runs(opened))[:: image.BLOCK_PAGES] // image.BLOCK_PAGES).tolist()
    with mmap.mmap(fd, opened.layout.page_map_at, mmap.MAP_SHARED, mmap.PROT_READ) as file:
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            chunk = blocks[start : start + _CHUNK_BLOCKS]
            following = blocks[start + _CHUNK_BLOCKS : start + 2 * _CHUNK_BLOCKS]
            await trio.to_thread.run_sync(_ask_for, fd, following)
            problem = await trio.to_thread.run_sync(_check_blocks, opened, file, chunk)
            if problem:
                _log.error(
                    "the image that the guest runs from is damaged: %s; the guest is paused, and what it has "
                    "done since it was restored may be wrong",
                    problem,
                )
                with suppress(KvmmigError):  # it has ended, or was moved
                    if machine.state is State.RUNNING:
                        await machine.pause()
                return
            for first, count in _runs_of(chunk):
                pages = await trio.to_thread.run_sync(OwnPages, machine.memory, first, count)
                await machine.while_parked(pages.replace)
            if progress is not None:
                progress((start + len(chunk)) * image.BLOCK_PAGES, len(blocks) * image.BLOCK_PAGES)


def _ask_for(fd: int, blocks: list[int]) -> None:
    """Have the kernel read these: the disk is at work while others are checked."""
    if blocks:
        start, stop = blocks[0] * image.BLOCK_PAGES, (blocks[-1] + 1) * image.BLOCK_PAGES
        if stop - start <= 2 * _CHUNK_BLOCKS * image.BLOCK_PAGES:  # else most of it may be holes
            size = (stop - start) * PAGE_SIZE
            os.posix_fadvise(fd, MEMORY_AT + start * PAGE_SIZE, size, os.POSIX_FADV_WILLNEED)


def _runs_of(blocks: list[int]) -> list[tuple[int, int]]:
    """Blocks as runs of pages: the first, and how many."""
    runs = runs_of(np.array(blocks, np.int64)) * image.BLOCK_PAGES
    return [(int(first), int(count)) for first, count in runs]


def _check_blocks(opened: image.OpenImage, file: mmap.mmap, blocks: list[int]) -> str:
    size = image.BLOCK_PAGES * PAGE_SIZE
    with memoryview(file) as view:
        for block in blocks:
            at = MEMORY_AT + block * size
            with view[at : at + size] as data:
                if problem := opened.check_block(block, data):
                    return problem
    return ""


async def _receive_memory(opened: ImageInOrder, channel: GuardedChannel, machine: Machine) -> None:
    header, memory = opened.header, machine.memory
    gap = MEMORY_AT - image.HEAD_SIZE - opened.manifest_size
    await _all_of(channel, memoryview(bytearray(gap)))
    step = _RECEIVED // PAGE_SIZE
    for first in range(0, header.n_pages, step):
        await _all_of(channel, memory.pages(first, min(step, header.n_pages - first)))
    tail = memoryview(bytearray(header.size - opened.layout.page_map_at))
    await _all_of(channel, tail)
    if await _receive_into(channel, memoryview(bytearray(1))):
        raise ImageError("it goes on behind its end")
    opened.finish(bytes(tail))
    problem = await trio.to_thread.run_sync(_check_memory, opened, machine)
    if problem:
        raise ImageError(problem)


def _check_memory(opened: image.OpenImage, machine: Machine) -> str:
    for block in range(opened.layout.n_blocks):
        pages = machine.memory.pages(block * image.BLOCK_PAGES, image.BLOCK_PAGES)
        if problem := opened.check_block(block, pages):
            return problem
    return ""


async def _all_of(channel: GuardedChannel, data: memoryview) -> None:
    if await _receive_into(channel, data) < len(data):
        raise ImageError("it ends too early: it was cut")


async def _receive_into(channel: GuardedChannel, data: memoryview) -> int:
    done = 0
    while done < len(data) and (count := await channel.receive_some(data[done:])):
        done += count
    return done


def _mapped_runs(opened: image.OpenImage) -> stream.Runs:
    unit = image.BLOCK_PAGES
    while len(runs := opened.data_runs(unit)) > _MOST_MAPPINGS:
        unit *= 2
    return runs


def _open_file(fd: int) -> image.OpenImage | None:
    try:
        return open_image(fd) if is_image(fd) else None
    except OSError as error:
        raise ChannelBroken(f"the image can't be read: {error.strerror}") from error


def _check_fits(description: MachineDescription) -> None:
    with System.open() as system:
        description.check_fits(system)
