"""Every error that kvmmig raises on purpose.

The text of an error is one sentence for the person at the keyboard: it names the thing, says what was
wrong with it, and what would be right. An operating-system error is translated in one place, where it
happens, and is kept as ``__cause__``::

    KvmmigError
    ├── KvmError                an ioctl failed: which one, why, and what to do
    │   ├── KvmUnavailable      /dev/kvm is missing, forbidden, busy or too old
    │   └── KvmUnsupported      this kernel lacks a capability that was asked for
    ├── MachineError            a machine can't be built or can't do that
    │   ├── BadConfig           a machine that can't exist: its memory, its vCPUs, a parameter
    │   ├── BadImage            a guest image that can't be loaded, an .asm that can't be assembled
    │   ├── WrongState          a command that the machine's present state does not allow
    │   └── StateMismatch       a saved state that this host or this machine can't take
    ├── TransportError          the way to the other side
    │   ├── BadURI              a URI that names no transport, or not in the way that transport wants
    │   ├── KnobError           a wrapper's knob that is not there, or can't be turned so
    │   ├── ConnectFailed       the channel could not be set up
    │   ├── ChannelBroken       the other side (or the disk, or the helper) broke it
    │   ├── ChannelClosed       you closed it
    │   └── ChannelBusy         two tasks used one direction of it at a time
    ├── StreamError             bytes that are not a migration stream
    │   ├── StreamTruncated     it ended too early
    │   ├── StreamVersion       a version or a feature that this kvmmig does not speak
    │   └── LocalStreamError    this side tried to send what the protocol does not allow: a bug here
    ├── ImageError              a file that is no whole image of a guest
    └── MigrationError          a migration that did not happen; the guest is where it was
        ├── MigrationRefused    the other side said no, and why
        ├── MigrationCancelled  somebody asked for it
        ├── GuestEnded          the guest ended before it had moved
        └── OutcomeUnknown      the link died right after "go": the one case that an operator must decide
"""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """``text`` with nothing in it that a terminal would obey, or hide: such a character becomes ``\\x1b``.

    For words from outside, whoever they are shown to: a peer's, an image's, a helper's, a name. Line breaks
    count, too, for a second line could pass for one of ours; ``keep`` has the characters that stay as they
    are.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


class KvmmigError(Exception):
    """The root of the tree. ``str()`` of any of them is one `printable` line, fit to be shown to a user."""

    def __str__(self) -> str:
        return printable(super().__str__())


class KvmError(KvmmigError):
    """An ioctl (or an open, or an mmap) on a KVM file descriptor failed.

    ``operation`` is the ioctl's name as in ``<linux/kvm.h>``, ``errno`` the number it failed with (0 where
    the call itself succeeded but its answer can't be used).
    """

    def __init__(self, message: str, *, operation: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.operation = operation
        self.errno = errno


class KvmUnavailable(KvmError):
    """There is no usable /dev/kvm; the text says what would mend it."""


class KvmUnsupported(KvmError):
    """This kernel's KVM lacks a capability that was asked for."""


class MachineError(KvmmigError):
    """A machine can't be built, or can't do what was asked."""


class BadConfig(MachineError):
    """A machine that can't exist: its memory, its vCPUs, a guest's parameter."""


class BadImage(MachineError):
    """A guest image that can't be loaded, or an assembler source that can't be assembled."""


class WrongState(MachineError):
    """The machine's present state does not allow this command. The machine is as it was."""


class StateMismatch(MachineError):
    """A captured state that this host or this machine can't take."""


class TransportError(KvmmigError):
    """Something about the way to the other side."""


class BadURI(TransportError):
    """A URI that names no transport, or names one in a way that it does not understand."""


class KnobError(TransportError):
    """There is no such knob on the channel, or it can't be turned to that. Nothing has changed."""


class ConnectFailed(TransportError):
    """The channel could not be set up. Nothing is left behind."""


class ChannelBroken(TransportError):
    """The other side, the disk or the helper broke the channel. Only ``abort`` and ``aclose`` still work."""


class ChannelClosed(TransportError):
    """The channel was used after this side had closed it."""


class ChannelBusy(TransportError):
    """Two tasks used the same direction of a channel at the same time."""


class StreamError(KvmmigError):
    """These bytes are not a migration stream, or not one that makes sense."""


class StreamTruncated(StreamError):
    """The stream ended before its end frame."""


class StreamVersion(StreamError):
    """A version or a feature that this kvmmig does not speak."""


class LocalStreamError(StreamError):
    """This side tried to send what the protocol does not allow: a bug in kvmmig."""


class ImageError(KvmmigError):
    """A file that is no image of a guest, or a damaged one, or one that can't be used for what was asked."""


class MigrationError(KvmmigError):
    """The migration did not happen. The guest is where it was, and runs if it ran."""


class MigrationRefused(MigrationError):
    """The other side refused, and said why."""


class MigrationCancelled(MigrationError):
    """The migration was cancelled by a command."""


class GuestEnded(MigrationError):
    """The guest ended by itself before it had moved."""


class OutcomeUnknown(MigrationError):
    """The link, or a reader that can't answer, failed after "go": the guest may run there, or nowhere.

    It does not run here, and never will by itself. Look at the other side first.
    """
