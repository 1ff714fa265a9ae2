"""A page set behaves as a Python set of the same pages does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.machine import pageset
from kvmmig.machine.pageset import PageSet, pages_of, runs_of

N_PAGES = 500
_ranges = st.tuples(st.integers(0, N_PAGES), st.integers(0, N_PAGES)).map(
    lambda ab: (min(ab), abs(ab[0] - ab[1]))
)
_edits = st.lists(st.tuples(st.booleans(), _ranges), max_size=20)


def _built(edits: list[tuple[bool, tuple[int, int]]]) -> tuple[PageSet, set[int]]:
    ours, model = PageSet(N_PAGES), set[int]()
    for insert, (first, count) in edits:
        if insert:
            ours.add(first, count)
            model |= set(range(first, first + count))
        else:
            ours.discard(first, count)
            model -= set(range(first, first + count))
    return ours, model


@given(_edits)
def test_adding_and_discarding_ranges_is_as_with_a_set(edits: list[tuple[bool, tuple[int, int]]]) -> None:
    ours, model = _built(edits)
    assert ours.pages().tolist() == sorted(model)
    assert len(ours) == len(model)
    assert bool(ours) == bool(model)
    assert all((page in ours) == (page in model) for page in range(0, N_PAGES, 7))


@given(_edits, _ranges)
def test_pages_of_a_part_are_the_members_in_it(
    edits: list[tuple[bool, tuple[int, int]]], part: tuple[int, int]
) -> None:
    ours, model = _built(edits)
    first, stop = part[0], part[0] + part[1]
    assert ours.pages(first, stop).tolist() == sorted(page for page in model if first <= page < stop)


@given(_edits, _edits)
def test_update_is_union(
    one: list[tuple[bool, tuple[int, int]]], two: list[tuple[bool, tuple[int, int]]]
) -> None:
    ours, model = _built(one)
    other, other_model = _built(two)
    ours.update(other)
    assert ours.pages().tolist() == sorted(model | other_model)


@given(st.sets(st.integers(0, N_PAGES - 1)))
def test_runs_and_pages_are_inverse(members: set[int]) -> None:
    ours = PageSet(N_PAGES)
    for page in members:
        ours.add(page)
    runs = ours.runs()
    assert pages_of(runs).tolist() == sorted(members)
    assert runs_of(pages_of(runs)).tolist() == runs.tolist()
    assert all(runs[i, 0] + runs[i, 1] < runs[i + 1, 0] for i in range(len(runs) - 1)), "runs are maximal"


@given(_edits, st.integers(1, 70), st.none() | st.integers(1, 70))
def test_batches_cover_every_member_once_even_when_what_was_sent_is_discarded(
    edits: list[tuple[bool, tuple[int, int]]], limit: int, scattered: int | None
) -> None:
    ours, model = _built(edits)
    seen: list[int] = []
    at = 0
    for batch in ours.batches(limit, scattered):
        assert 0 < len(batch.pages) <= limit
        if scattered is not None and len(batch.pages) > scattered:
            assert (np.diff(batch.pages) == 1).all()
        assert batch.first >= at, "batches ascend and do not overlap"
        at = batch.stop
        seen += batch.pages.tolist()
        ours.discard(batch.first, batch.stop - batch.first)
    assert seen == sorted(model)
    assert not ours


def test_batches_span_more_than_one_window() -> None:
    ours = PageSet(pageset.WINDOW * 3 + 64)
    ours.add(pageset.WINDOW - 2, 4)
    ours.add(pageset.WINDOW * 3 + 63)
    pages = [page for batch in ours.batches(1024) for page in batch.pages.tolist()]
    assert pages == [*range(pageset.WINDOW - 2, pageset.WINDOW + 2), pageset.WINDOW * 3 + 63]


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (N_PAGES, 1), (N_PAGES - 1, 2)])
def test_pages_outside_the_guest_are_refused(first: int, count: int) -> None:
    with pytest.raises(IndexError):
        PageSet(N_PAGES).add(first, count)
