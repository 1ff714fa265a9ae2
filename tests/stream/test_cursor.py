"""The cursor knows the byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmmig.stream.cursor import MAX_BUFFERS, Cursor


@given(st.lists(st.binary(max_size=20), max_size=20), st.data())
def test_any_way_of_accepting_prefixes_yields_every_byte_once_in_order(
    frames: list[bytes], data: st.DataObject
) -> None:
    cursor = Cursor()
    done: list[int] = []
    ends = [sum(map(len, frames[: i + 1])) for i in range(len(frames))]
    for i, frame in enumerate(frames):
        cursor.put(frame[:7], frame[7:], accepted=lambda i=i: done.append(i))  # type: ignore[misc]  # mypy can't infer a lambda's default
    out = b""
    while not cursor.empty:
        joined = b"".join(cursor.head())
        take = data.draw(st.integers(1, len(joined)))
        out += joined[:take]
        cursor.advance(take)
        assert len(done) >= sum(end < len(out) for end in ends), "a frame that is wholly out is told"
        assert all(ends[i] <= len(out) for i in done), "none is told too early"
    cursor.advance(0)
    assert out == b"".join(frames)
    assert done == list(range(len(frames)))
    assert cursor.accepted == len(out)


def test_one_call_never_gets_more_buffers_than_the_kernel_takes() -> None:
    cursor = Cursor()
    cursor.put(*[b"x"] * (MAX_BUFFERS + 5))
    assert len(cursor.head()) == MAX_BUFFERS
    cursor.advance(MAX_BUFFERS)
    assert len(cursor.head()) == 5
