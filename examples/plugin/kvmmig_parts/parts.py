"""``parts:PATH``: a saved guest in numbered parts, as an object store keeps it.

The parts are files beside ``PATH``: ``PATH.3f9ac01b.0`` and so on, where the middle is the upload's own name.
``PATH`` itself is the manifest, which says which upload and how many parts. It is written last, under another
name, and renamed; so a saved guest appears when all of it is on the disk, and an older one stays until then.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Listener, Option, ReceiveChannel, SendChannel, Transport, TransportURI
from kvmmig.transport.toolkit import in_thread, stored_receiver, stored_sender, why
from kvmmig.units import parse_size


class PartsTransport(Transport):
    summary = "a saved guest in numbered parts, beside a manifest"
    syntax = "parts:PATH"
    options = (Option("size", "bytes of a part", default="8MiB"),)
    target_is_path = True
    stores = True
    arrives_at_once = True

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no file: write parts:PATH, such as parts:/var/tmp/guest")
        try:
            self._size = parse_size(self.option("size"))
        except ValueError as error:
            raise BadURI(f"{str(uri)!r}: size: {error}") from error
        if not 1 << 12 <= self._size <= 1 << 30:
            raise BadURI(f"{str(uri)!r}: a part has at least 4KiB and at most 1GiB")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        upload = _Upload(self.uri.target)
        await in_thread(upload.check)()
        async with stored_sender(
            in_thread(upload.put),
            in_thread(upload.commit),
            in_thread(upload.discard),
            peer=self.uri.target,
            part_size=self._size,
        ) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        yield _PartsListener(self.uri)


class _PartsListener(Listener):
    def __init__(self, uri: TransportURI) -> None:
        self.uri = uri

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        path = self.uri.target
        name, parts = await in_thread(_read_manifest)(path)

        def get(number: int) -> bytes:
            return Path(f"{path}.{name}.{number}").read_bytes()

        async with stored_receiver(in_thread(get), parts, peer=path) as channel:
            yield channel


class _Upload:
    """The files of one save. All of its methods may block: they are for threads."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._name = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._given_up = self._committed = False

    def check(self) -> None:
        """Raise `ConnectFailed` where nothing can be put."""
        directory = os.path.dirname(self._path) or "."
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConnectFailed(
                f"can't write {self._path}: {directory} is no directory that you may write to"
            )

    def put(self, number: int, data: memoryview) -> None:
        part = f"{self._path}.{self._name}.{number}"
        _write(part, data)
        if self._given_up:  # this call was left behind, and the discard did not see its file
            os.unlink(part)

    def commit(self, parts: int) -> None:
        older = _uploads_of(self._path)
        _sync_directory(self._path)
        manifest = f"{self._path}.{self._name}.manifest"
        _write(manifest, memoryview(json.dumps({"upload": self._name, "parts": parts}).encode()))
        with self._lock:  # a commit that was left behind must not come after the discard
            if self._given_up:
                os.unlink(manifest)
                return
            os.rename(manifest, self._path)
            self._committed = True
        _sync_directory(self._path)
        for name in older:
            _remove(self._path, name)

    def discard(self) -> None:
        with self._lock:
            self._given_up = not self._committed
        if self._given_up:
            _remove(self._path, self._name)


def _read_manifest(path: str) -> tuple[str, int]:
    try:
        told = json.loads(Path(path).read_bytes())
        return str(told["upload"]), int(told["parts"])
    except OSError as error:
        raise ConnectFailed(f"can't read {path}: {why(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConnectFailed(f"can't read {path}: it is no manifest of parts") from error


def _uploads_of(path: str) -> list[str]:
    """The upload that an older manifest names, if there is one."""
    try:
        return [_read_manifest(path)[0]]
    except ConnectFailed:
        return []


def _write(path: str, data: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # a guest's memory holds its secrets
    with open(fd, "wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: str, name: str) -> None:
    for file in glob.glob(f"{glob.escape(f'{path}.{name}')}.*"):
        with contextlib.suppress(OSError):
            os.unlink(file)
