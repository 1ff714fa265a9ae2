from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

from kvmmig.errors import KvmError, KvmUnsupported
from kvmmig.kvm import ioctl


def failing(*numbers: int) -> Callable[..., int]:
    """An ioctl that fails once with each of these errnos, and answers 7 after that."""
    left = list(numbers)

    def fake(fd: int, request: int, argument: object) -> int:
        if not left:
            return 7
        ctypes.set_errno(left.pop(0))
        return -1

    return fake


def test_an_interrupted_call_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "raw_ioctl", failing(errno.EINTR, errno.EINTR))
    assert ioctl.ioctl(3, ioctl.KVM_GET_CLOCK) == 7


def test_an_error_names_the_request_the_subject_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "raw_ioctl", failing(errno.ENOMEM))
    with pytest.raises(KvmError) as caught:
        ioctl.ioctl(3, ioctl.KVM_SET_USER_MEMORY_REGION, subject="memory slot 0")
    assert str(caught.value) == (
        "KVM_SET_USER_MEMORY_REGION for memory slot 0 failed: Cannot allocate memory "
        "(the host is out of memory; use a smaller guest, or end other programs)"
    )
    assert (caught.value.operation, caught.value.errno) == ("KVM_SET_USER_MEMORY_REGION", errno.ENOMEM)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_request_that_the_kernel_does_not_have_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ioctl, "raw_ioctl", failing(errno.ENOTTY))
    with pytest.raises(KvmUnsupported, match=r"KVM_CLEAR_DIRTY_LOG failed: .*use a newer kernel"):
        ioctl.ioctl(3, ioctl.KVM_CLEAR_DIRTY_LOG)
