"""What this host allows: namespaces, a loop device, root; found out once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.faults.disk import why_no_disk, why_no_throttle
from tests.faults.network import Cable, move_into_own_namespaces


@dataclass(frozen=True)
class Host:
    """Sentences are empty where there is nothing to complain of."""

    cable: Cable | None
    why_no_cable: str
    why_no_disk: str
    why_no_throttle: str

    @classmethod
    @contextmanager
    def explored(cls) -> Iterator[Host]:
        """To be called before there are threads: this process leaves the host's network and mounts."""
        why_no_cable = move_into_own_namespaces()
        with ExitStack() as stack:
            # Outside a namespace of its own this process mounts nothing: it might be left behind.
            disk = why_no_cable or why_no_disk()
            cable = None
            if not why_no_cable:
                try:
                    cable = stack.enter_context(Cable.plugged_in())
                except (OSError, RuntimeError) as error:
                    why_no_cable = f"needs a veth pair between two network namespaces ({error})"
            yield cls(cable, why_no_cable, disk, why_no_throttle())
