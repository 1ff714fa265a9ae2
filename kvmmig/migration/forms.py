"""What a guest is written as: a stream, or an image. Each puts into its cursor what `PreCopy` has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvmmig import image, stream
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.migration.imagepages import ImagePages
from kvmmig.migration.pages import PendingPages
from kvmmig.migration.record import CountsPages


class Form(ABC):
    """``pages`` puts memory into ``cursor``; ``counts`` says how many pages have been put."""

    cursor: stream.Cursor | image.PieceCursor
    pages: PendingPages | ImagePages
    counts: CountsPages
    #: 16 bytes that no other migration has; the destination knows a stream's.
    identity: bytes

    @abstractmethod
    def introduce(self, *, two_way: bool, page_digests: bool) -> None:
        """Put what comes before memory. ``page_digests`` are wanted even where nothing is stored."""

    @abstractmethod
    def finish(self, sections: Sequence[StateSection], *, running: bool) -> None:
        """Put what comes behind memory; ``running`` is whether the guest ran."""

    @abstractmethod
    def go(self) -> None:
        """Put the word that hands the guest over, where there is one."""


class StreamForm(Form):
    """As a stream."""

    def __init__(self, memory: GuestMemory, pending: PageSet, describe: Callable[[], bytes]) -> None:
        """``describe()`` is what the machine says of itself, as JSON."""
        self._n_pages = memory.n_pages
        self._describe = describe
        self._encoder = self.counts = stream.Encoder(stream.Direction.FORWARDS)
        self.identity = self._encoder.identity
        self.cursor: stream.Cursor = stream.Cursor()
        self.pages: PendingPages = PendingPages(memory, pending, self._encoder, self.cursor)

    def introduce(self, *, two_way: bool, page_digests: bool) -> None:
        self.cursor.put(self._encoder.preamble())
        # A link has checksums of its own. Disks have none, and what goes one way may end, and lie, on one.
        self.pages.stable = page_digests or not two_way
        features = (stream.PAGE_DIGESTS,) if self.pages.stable else ()
        self.cursor.put(self._encoder.hello(self._n_pages, self._describe(), features))

    def finish(self, sections: Sequence[StateSection], *, running: bool) -> None:
        for section in sections:
            self.cursor.put(
                self._encoder.section(stream.Section(section.name, section.version, section.data))
            )
        self.cursor.put(self._encoder.end(running=running))

    def go(self) -> None:
        self.cursor.put(self._encoder.signal(stream.Kind.GO))


class ImageForm(Form):
    """As an image."""

    def __init__(self, memory: GuestMemory, pending: PageSet, describe: Callable[[], bytes]) -> None:
        """``describe()`` is what the machine says of itself, as JSON."""
        self._describe = describe
        self.cursor: image.PieceCursor = image.PieceCursor()
        self.pages: ImagePages = ImagePages(memory, pending, self.cursor)
        self.counts = self.pages
        self.identity = self.pages.identity

    def introduce(self, *, two_way: bool, page_digests: bool) -> None:
        """Nothing comes first: the head, which makes it an image, is written last."""

    def finish(self, sections: Sequence[StateSection], *, running: bool) -> None:
        state = [stream.Section(section.name, section.version, section.data) for section in sections]
        self.pages.finish(self._describe(), state, running=running)

    def go(self) -> None:
        """It has its name when the channel has been closed; there is no other word."""
