"""The loop's thread asks for short slices; what it starts is scheduled as everybody is."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from kvmmig.cli.scheduling import SLICE, Scheduling, ask_for_short_slices, scheduling

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns in a thread of its own, which is scheduled by itself."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_gets_what_it_may_and_those_that_it_makes_are_as_before() -> None:
    before = in_thread(scheduling)  # of a process whose loop has asked already, perhaps

    def both() -> tuple[Scheduling, Scheduling]:
        return ask_for_short_slices(), in_thread(scheduling)

    asked, made = in_thread(both)
    assert made == before
    assert asked.nice in (before.nice, -10)
    assert before.slice == 0.0 or asked.slice <= min(before.slice, SLICE)


def test_who_was_started_by_nice_stays_as_that_says() -> None:
    def nicer() -> Scheduling:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        return ask_for_short_slices()

    assert in_thread(nicer).nice == 15
