"""A small disk of our own that can be filled, frozen, slowed down, made read-only, or made to fail.

It is ext4 on a loop device over a sealable memory file. Everything here may block: call it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZE = 256 << 20  # sparse: only what is written takes memory
_LONGEST_FROST = 60  # seconds
_THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")

# <linux/fs.h>, <linux/fcntl.h>
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_IMMUTABLE_FL = 0x10
_F_ADD_SEALS, _F_SEAL_WRITE = 1033, 8


def why_no_disk() -> str:
    """Why there can be no such disk here; empty if there can."""
    for name in ("losetup", "mkfs.ext4", "mount", "umount", "fsfreeze"):
        if shutil.which(name) is None:
            return f"needs the program {name}"
    try:
        with Disk.open():
            return ""
    except (OSError, RuntimeError) as error:
        return f"needs a file system on a loop device ({error})"


def why_no_throttle() -> str:
    """Why a disk can't be slowed down here; empty if it can."""
    return "" if os.access(_THROTTLE, os.W_OK) else f"needs cgroup v1's blkio controller ({_THROTTLE})"


class Disk:
    """A mounted file system. ``folder`` is its root directory; it holds nothing of ours."""

    def __init__(self, memory_fd: int, device: str, folder: Path) -> None:
        self.folder = folder
        self._memory_fd = memory_fd
        number = os.stat(device).st_rdev
        self._number = f"{os.major(number)}:{os.minor(number)}"
        self._frozen = self._immutable = self._throttled = False
        self._rescue: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Disk]:
        """Make and mount it; take it down afterwards, thawed and all."""
        memory_fd = os.memfd_create("faults-disk", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        try:
            os.ftruncate(memory_fd, _SIZE)
            device = _run("losetup", "--find", "--show", f"/proc/{os.getpid()}/fd/{memory_fd}")
            try:
                # No journal: after a write error it would only turn the whole disk read-only.
                _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", device)
                _run("mount", device, str(folder))
            finally:
                _run("losetup", "--detach", device)  # as soon as it is mounted no more
            try:
                disk = cls(memory_fd, device, folder)
                (folder / "lost+found").rmdir()
                try:
                    yield disk
                finally:
                    disk.heal()
            finally:
                _run("umount", str(folder))
        finally:
            os.close(memory_fd)
            _remove(folder)

    def fill(self) -> None:
        """From here on there is no space left."""
        with open(self.folder / ".filler", "wb") as filler:
            for size in (_SIZE, 4096):  # one that is too large takes what there is, but for a rest
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), size)

    def break_writes(self) -> None:
        """From here on every write to the device is an I/O error. For good."""
        fcntl.fcntl(self._memory_fd, _F_ADD_SEALS, _F_SEAL_WRITE)

    def freeze(self) -> None:
        """As ``fsfreeze -f``: whoever writes hangs in the kernel.

        A process with a thread that hangs there can't even be killed, so somebody else thaws it in the end.
        """
        rescue = f"sleep {_LONGEST_FROST}; fsfreeze --unfreeze {shlex.quote(str(self.folder))}"
        self._rescue = subprocess.Popen(["sh", "-c", rescue], start_new_session=True)
        with self._folder_fd() as fd:
            fcntl.ioctl(fd, _FIFREEZE, 0)
        self._frozen = True

    def forbid_new_names(self) -> None:
        """As ``chattr +i`` on the folder: open files can be written, but nothing can be added."""
        self._set_immutable(True)

    def make_read_only(self) -> None:
        """Only while no file is open for writing."""
        _run("mount", "-o", "remount,ro", str(self.folder))

    def slow_down(self, bytes_per_second: int) -> None:
        """For all that is written around the page cache."""
        _THROTTLE.write_text(f"{self._number} {bytes_per_second}")
        self._throttled = bytes_per_second > 0

    def heal(self) -> None:
        """End all that would keep a thread, a process or an ``umount`` hanging. Idempotent."""
        if self._frozen:
            with self._folder_fd() as fd:
                fcntl.ioctl(fd, _FITHAW, 0)
            self._frozen = False
        if self._rescue:
            os.killpg(self._rescue.pid, signal.SIGKILL)
            self._rescue.wait()
            self._rescue = None
        if self._throttled:
            self.slow_down(0)
        if self._immutable:
            self._set_immutable(False)

    def files(self) -> set[str]:
        """The names that are there, but for our own."""
        return set(os.listdir(self.folder)) - {".filler"}

    def _set_immutable(self, on: bool) -> None:
        with self._folder_fd() as fd:
            flags = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8)))[0]
            flags = flags | _FS_IMMUTABLE_FL if on else flags & ~_FS_IMMUTABLE_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags))
        self._immutable = on

    @contextmanager
    def _folder_fd(self) -> Iterator[int]:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield fd
        finally:
            os.close(fd)


def _remove(folder: Path) -> None:
    """It is busy for a moment longer where a process with a mount namespace of its own just died."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.1)
        else:
            return
    folder.rmdir()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()
