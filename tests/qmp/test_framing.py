"""Where messages begin and end, whatever the stream is cut into."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmmig.qmp.framing import Malformed, MessageSplitter

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_OBJECTS = st.dictionaries(st.text(max_size=5), _JSON, max_size=4)
_BETWEEN = st.sampled_from(["", " ", "\n", "\r\n", " \t\r\n\n"])


def split(*pieces: bytes, splitter: MessageSplitter | None = None) -> list[bytes | str]:
    """Everything that was found; of what was malformed, why."""
    splitter = splitter or MessageSplitter()
    found = [message for piece in pieces for message in splitter.feed(piece)]
    return [message.reason if isinstance(message, Malformed) else message for message in found]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@given(st.lists(st.tuples(_OBJECTS, _BETWEEN, st.booleans()), max_size=4), st.data())
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[tuple[dict[str, Any], str, bool]], data: st.DataObject
) -> None:
    texts = [
        (json.dumps(message, ensure_ascii=ascii, indent=1 if ascii else None), between)
        for message, between, ascii in messages
    ]
    stream = "".join(text + between for text, between in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole = [text.encode() for text, _ in texts]
    assert split(*pieces) == whole
    assert split(*byte_by_byte(stream)) == whole
    assert split(stream, b"  {") == whole


@given(st.binary(max_size=200), st.data())
def test_garbage_means_the_same_however_it_is_cut(garbage: bytes, data: st.DataObject) -> None:
    wanted = split(*byte_by_byte(garbage))
    cut = data.draw(st.integers(0, len(garbage)))
    assert split(garbage[:cut], garbage[cut:]) == wanted


@example(b'{"\\')
@given(st.text(alphabet='{}[]"\\\n\xff,: a1', max_size=60).map(lambda text: text.encode("latin-1")))
def test_after_any_garbage_a_reset_makes_it_listen_again(garbage: bytes) -> None:
    splitter = MessageSplitter()
    split(garbage, splitter=splitter)
    *_, last = split(b'\xff{"a": 1}', splitter=splitter)
    assert last == b'{"a": 1}'


def test_brackets_and_escaped_quotes_in_strings_are_no_ends() -> None:
    text = rb'{"a\"}": "]}{[\\", "b": ["}"]}'
    assert split(text + b"{}") == [text, b"{}"]
    assert split(*byte_by_byte(text + b"{}")) == [text, b"{}"]


@pytest.mark.parametrize(
    ("garbage", "reason"),
    [
        (b"hello", "stray 'h': a message is an object, and begins with '{'"),
        (b"\x00\x01", r"stray '\x00': a message is an object, and begins with '{'"),
        (b"}", "expecting value"),
        (b'{"a": "no end', "a string has a control character, or no end on its line"),
        (b'{"a": "\x01"}', "a string has a control character, or no end on its line"),
    ],
)
def test_a_bad_line_is_one_error_and_the_next_line_is_read(garbage: bytes, reason: str) -> None:
    stream = garbage + b'\n{"a": 1}'
    assert split(stream) == split(*byte_by_byte(stream)) == [reason, b'{"a": 1}']


def test_0xff_ends_whatever_was_begun() -> None:
    cut_short = "a message was cut short by a byte 0xFF"
    assert split(b'{"a": [\xff{}') == [cut_short, b"{}"]
    assert split(b'{"a": "b\xff{}') == [cut_short, b"{}"]
    assert split(b'{"a": "\\\xff{}') == [cut_short, b"{}"]
    assert split(b"\xff\xff\xff{}") == ["a byte 0xFF came between two messages", b"{}"]


def test_a_message_may_have_so_many_bytes_and_no_more() -> None:
    fits = b'{"a": "' + b"x" * 91 + b'"}'
    for over in (0, 1):
        text = fits[:-2] + b"x" * over + fits[-2:] + b"\n{}"
        wanted = ["a message has more than 100 bytes" if over else fits, b"{}"]
        assert split(text, splitter=MessageSplitter(100)) == wanted
        assert split(*byte_by_byte(text), splitter=MessageSplitter(100)) == wanted


@pytest.mark.parametrize("start", [b"{", b'{"', b'{"a": [', b"{[", b"x"])
def test_a_message_without_an_end_is_not_kept(start: bytes) -> None:
    splitter = MessageSplitter(1000)
    found = split(start, *[b" x" * 500] * 100, splitter=splitter)
    assert len(found) == 1
    assert len(splitter._data) <= 2000


def test_nesting_may_be_so_deep_and_no_deeper() -> None:
    assert split(b"{" + b"[" * 255 + b"]" * 255 + b"}") == [b"{" + b"[" * 255 + b"]" * 255 + b"}"]
    assert split(b"{" + b"[" * 256 + b"\n{}") == ["it is nested more than 256 deep", b"{}"]


def test_a_stream_is_scanned_once() -> None:
    """A message of half a megabyte that comes in small pieces would take minutes if each began anew."""
    splitter = MessageSplitter(1 << 20)
    text = b"{" + b'"a": [{}], ' * 50_000 + b"}"
    pieces = [text[i : i + 64] for i in range(0, len(text), 64)]
    assert split(*pieces, splitter=splitter) == [text]
