"""What the ``image`` commands do. They block, and need neither KVM nor an event loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvmmig import __version__
from kvmmig.cli.printing import echo, echo_json
from kvmmig.errors import ConnectFailed, ImageError, StreamError
from kvmmig.image.convert import StreamReader, image_of, stream_of
from kvmmig.image.export import export_core, export_flat
from kvmmig.image.format import PAGE_SIZE
from kvmmig.image.opened import OpenImage, Read, changed_runs
from kvmmig.image.reading import is_image, open_image, reader, stored_parts
from kvmmig.transport.toolkit import SavedFile, SaveFile, why
from kvmmig.transport.toolkit.savefile import Replace, Replaced
from kvmmig.units import format_size

_FAILED = 1
_SHOWN_RUNS = 40


@dataclass(frozen=True)
class _Opened:
    image: OpenImage
    read: Read
    file: SavedFile


def show_info(path: str, *, as_json: bool) -> int:
    """What an image is. Raises `ImageError`, `ConnectFailed`."""
    with _opened(path) as opened:
        header, found = opened.image.header, os.fstat(opened.file.fd)
        machine = json.loads(bytes(header.machine))
        size = {"file": header.size, "on-disk": found.st_blocks * 512}
        if as_json:
            echo_json(
                {
                    "path": path,
                    "identity": opened.image.identity.hex(),
                    "saved-by": header.saved_by,
                    "saved-at": header.saved_at,
                    "running": header.running,
                    "memory": header.n_pages * PAGE_SIZE,
                    "data-pages": header.data_pages,
                    "zero-pages": header.n_pages - header.data_pages,
                    **size,
                    "sections": {section.name: len(section.data) for section in opened.image.sections},
                    "machine": machine,
                },
                indent=True,
            )
            return 0
        saved_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.saved_at))
        rows = [
            (
                "guest",
                f"{machine.get('name')}, {machine.get('cpus')} vCPU, which "
                f"{'ran' if header.running else 'was paused'}",
            ),
            ("saved", f"{saved_at} by {header.saved_by}"),
            (
                "memory",
                f"{format_size(header.n_pages * PAGE_SIZE)}: {header.data_pages} pages with data, "
                f"{header.n_pages - header.data_pages} that are zero",
            ),
            ("state", f"{len(opened.image.sections)} sections, {format_size(header.state_size)}"),
            ("file", f"{format_size(size['file'])} long, {format_size(size['on-disk'])} on the disk"),
            ("identity", opened.image.identity.hex()),
        ]
        for name, text in rows:
            echo(f"{name:<9} {text}")
    return 0


def verify_image(path: str) -> int:
    """Check all of it. Raises `ImageError` for a head, or a table, that is not whole, and `ConnectFailed`."""
    with _opened(path) as opened:
        problems = 0
        for problem in opened.image.verify(opened.read, stored_parts(opened.file.fd)):
            problems += 1
            echo(f"kvmmig: {path}: {problem}", err=True)
        if problems:
            echo(
                f"kvmmig: {path}: {problems} damaged blocks; the guest must not be restored from it", err=True
            )
            return _FAILED
        echo(f"{path} is whole: {opened.image.header.data_pages} pages, and its machine's state")
    return 0


def show_difference(one: str, other: str, *, as_json: bool) -> int:
    """What differs. Raises `ImageError`, `ConnectFailed`."""
    with _opened(one) as first, _opened(other) as second:
        runs = changed_runs(first.image, second.image, first.read, second.read).tolist()
        mine = {section.name: section for section in first.image.sections}
        theirs = {section.name: section for section in second.image.sections}
        sections = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        pages = sum(count for _, count in runs)
        if as_json:
            echo_json({"pages": pages, "runs": runs, "sections": sections})
            return _FAILED if runs or sections else 0
        if not runs and not sections:
            echo("the guests are the same: memory and state")
            return 0
        echo(f"{pages} of {first.image.header.n_pages} pages differ ({format_size(pages * PAGE_SIZE)})")
        for start, count in runs[:_SHOWN_RUNS]:
            echo(f"  pages {start} to {start + count - 1}" if count > 1 else f"  page {start}")
        if len(runs) > _SHOWN_RUNS:
            echo(f"  and {len(runs) - _SHOWN_RUNS} more runs; --json has them all")
        echo(f"state sections that differ: {', '.join(sections) or 'none'}")
    return _FAILED


def export_image(path: str, to: str, form: str) -> int:
    """Write it for other tools. Raises `ImageError`, `ConnectFailed`."""
    with _opened(path) as opened, _new_file(to) as file:

        def write(offset: int, data: bytes) -> None:
            _write(file, offset, memoryview(data))

        size = (export_core if form == "core" else export_flat)(opened.image, opened.read, write)
        os.ftruncate(file.fd, size)
    echo(f"{to} has been written: {format_size(size)}")
    return 0


def convert_image(source: str, to: str) -> int:
    """A stream to an image, or back. Raises `ImageError`, `StreamError`, `ConnectFailed`."""
    with _file(source) as file, _new_file(to) as new, _naming(source):
        if is_image(file.fd):
            position = 0

            def put(data: bytes | memoryview) -> None:
                nonlocal position
                _write(new, position, memoryview(data))
                position += len(data)

            stream_of(open_image(file.fd), reader(file.fd), put)
            kind = "a stream"
        else:
            image_of(
                StreamReader(lambda buffer: os.readv(file.fd, [buffer])),
                lambda piece: _write(new, piece[0], piece[1]),
                saved_by=f"kvmmig {__version__}, from a stream",
            )
            kind = "an image"
    echo(f"{to} has been written: {kind}")
    return 0


@contextmanager
def _opened(path: str) -> Iterator[_Opened]:
    with _file(path) as file, _naming(path):
        if not is_image(file.fd):
            raise ImageError(
                "it is no image of a guest; a stream, as --transport pipe saves it, becomes one by "
                '"kvmmig image convert"'
            )
        yield _Opened(open_image(file.fd), reader(file.fd), file)


@contextmanager
def _file(path: str) -> Iterator[SavedFile]:
    file = SavedFile(path, direct=False)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors about its content name the file."""
    try:
        yield
    except (ImageError, StreamError) as error:
        if path in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


@contextmanager
def _new_file(path: str) -> Iterator[SaveFile]:
    """A file that appears under its name when all is in it, in the place of an older one."""
    file = SaveFile.create(path, direct=False, replace=Replace.SEEN)
    try:
        yield file
        file.publish()
    except Replaced as error:
        raise ConnectFailed(f"can't write {path}: {error}") from error
    except OSError as error:
        raise ConnectFailed(f"can't write {path}: {why(error)}") from error
    finally:
        file.close()


def _write(file: SaveFile, offset: int, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        count = os.pwrite(file.fd, data, offset)
        data, offset = data[count:], offset + count
