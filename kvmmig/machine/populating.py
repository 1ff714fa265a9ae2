"""Memory is touched ahead of whoever uses it, so that nobody waits for the kernel to find it page by page."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

from kvmmig.errors import BadConfig

_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # Linux 5.14, madvise(2)
# One call holds a lock that whoever maps memory or starts a thread needs, so it is to take a millisecond.
_CHUNK = 2 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def anonymous(size: int) -> mmap.mmap:
    """A private mapping of ``size`` zero bytes, huge pages advised. Raises `BadConfig` for want of room."""
    try:
        mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BadConfig(
            f"this host has no room for {size} bytes of guest memory: {error.strerror}"
        ) from error
    _libc.madvise(_address(mapping), size, _MADV_HUGEPAGE)  # only advice: no matter if the kernel has none
    return mapping


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class Populating:
    """A thread that touches a mapping from its first byte to its last; it changes none.

    It holds the GIL between two chunks only. The mapping may be used meanwhile, and must stay until `stop`
    has returned.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._base = _address(mapping)
        self._size = len(mapping)
        self._stopped = False
        #: Bytes that have been touched, from the first on.
        self.done = 0
        self._error = 0
        self._thread = threading.Thread(target=self._run, name="populating", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `BadConfig` where it has found that this host has not got the memory."""
        if self._error:
            raise BadConfig(
                f"this host has no room for {self._size} bytes of guest memory ({os.strerror(self._error)}); "
                "use a smaller --memory"
            )

    def wait(self) -> None:
        """Block until all is touched, or can't be."""
        self._thread.join()

    def stop(self) -> None:
        """End it, and block until it has ended: a few milliseconds. Idempotent."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        while self.done < self._size and not self._stopped:
            length = min(_CHUNK, self._size - self.done)
            if _libc.madvise(self._base + self.done, length, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                if code != errno.EINVAL:  # which is a kernel without this: memory comes as it is used
                    self._error = code
                return
            self.done += length


class Reserve:
    """Memory for a guest that is yet to come, populated from now on. Not thread-safe."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes. Raises `BadConfig` for want of room."""
        self._mapping = anonymous(size)
        self._populating = Populating(self._mapping)

    @property
    def size(self) -> int:
        """Bytes that it still has; 0 once it was taken or closed."""
        return 0 if self._mapping.closed else len(self._mapping)

    def take(self, size: int) -> mmap.mmap:
        """All of it, as a mapping of ``size`` bytes; the caller's from now on. Blocks for milliseconds.

        Where the guest is larger, what is missing is not populated yet; where it is smaller, the rest goes
        back. It can be taken once: after that, and after `close`, this is a mapping like any other.
        """
        if self._mapping.closed:
            return anonymous(size)
        self._populating.stop()
        mapping, self._mapping = self._mapping, _CLOSED
        if size != len(mapping):
            try:
                mapping.resize(size)
            except OSError:
                mapping.close()
                return anonymous(size)
        return mapping

    def close(self) -> None:
        """Give back what was not taken. Idempotent."""
        if not self._mapping.closed:
            self._populating.stop()
            self._mapping.close()


_CLOSED = mmap.mmap(-1, mmap.PAGESIZE)
_CLOSED.close()
