"""A URI is an object first: as text it can always be read back whole. Options can come from files."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmmig.errors import BadURI
from kvmmig.transport import Listener, Option, SendChannel, Transport, TransportURI

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
OPTIONS = st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True)
# What can be in a path or in an argument: also a byte that is no UTF-8, as os.fsdecode gives it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("?%&=+#:/ \n\udcff\udc80"))
TRICKY = st.text(st.sampled_from("?%&=+a3F25bfB.\n"), max_size=20)


@given(
    scheme=NAMES,
    target=TEXTS | TRICKY,
    options=st.dictionaries(OPTIONS, TEXTS | TRICKY, max_size=4),
    wrappers=st.lists(NAMES, max_size=3).map(tuple),
)
@example(scheme="file", target="/a?b=c", options={}, wrappers=())
@example(scheme="file", target="/a?b=c?d=e", options={}, wrappers=())
@example(scheme="file", target="/a%3Fb=c", options={}, wrappers=())
@example(scheme="file", target="/a%253F?", options={"x": ""}, wrappers=())
@example(scheme="exec", target="cat | tee a+b", options={"x": "a+b c%20&?="}, wrappers=("throttle",))
@example(scheme="file", target="\udcff", options={"x": "\udcff"}, wrappers=())
def test_every_uri_can_be_read_back(
    scheme: str, target: str, options: dict[str, str], wrappers: tuple[str, ...]
) -> None:
    uri = TransportURI(scheme, target, options, wrappers)
    assert TransportURI.parse(str(uri)) == uri


@given(TEXTS | TRICKY, st.dictionaries(OPTIONS, TRICKY, max_size=3))
def test_text_that_is_a_uri_means_the_same_when_written_again(target: str, options: dict[str, str]) -> None:
    text = f"tcp:{target}" + "?" + "&".join(f"{name}={value}" for name, value in options.items())
    try:
        uri = TransportURI.parse(text)
    except BadURI:
        return
    assert TransportURI.parse(str(uri)) == uri


def test_a_plus_is_a_plus_and_a_percent_is_escaped() -> None:
    uri = TransportURI.parse("tcp:host:1?a=1+1&b=%26%3F%25%2B")
    assert uri.options == {"a": "1+1", "b": "&?%+"}
    assert str(uri) == "tcp:host:1?a=1+1&b=%26%3F%25+"


def test_most_paths_need_no_escape() -> None:
    for path in ("/srv/what?", "/srv/100%", "/a b/ü&=+", "%20", "/a?b", "/a??b=c/d=e?"):
        assert str(TransportURI("file", path)) == f"file:{path}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp", "is not a transport URI: write scheme:target"),
        ("TCP:x", "is not a transport URI"),
        ("+tcp:x", "is not a transport URI"),
        ("tcp:x?a=1&a=2", "gives the option 'a' twice"),
    ],
)
def test_what_is_no_uri_is_told_what_one_looks_like(text: str, why: str) -> None:
    with pytest.raises(BadURI, match=why):
        TransportURI.parse(text)


@pytest.mark.parametrize(
    ("scheme", "options", "wrappers"), [("", {}, ()), ("a b", {}, ()), ("a", {"A": ""}, ()), ("a", {}, ("",))]
)
def test_an_object_with_impossible_names_is_refused(
    scheme: str, options: dict[str, str], wrappers: tuple[str, ...]
) -> None:
    with pytest.raises(BadURI, match="is no name for"):
        TransportURI(scheme, "x", options, wrappers)


class Optional(Transport):
    options = (
        Option("mode", "", default="slow", choices=("slow", "quick")),
        Option("key", "", secret=True),
        Option("cert.file", "a path of its own"),
    )

    def connect(self) -> AbstractAsyncContextManager[SendChannel]:
        raise NotImplementedError

    def listen(self) -> AbstractAsyncContextManager[Listener]:
        raise NotImplementedError


def _optional(**options: str) -> Optional:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return Optional(TransportURI("odd", "x", given))


def test_an_option_is_as_the_uri_has_it_or_as_its_file_says(tmp_path: Path) -> None:
    (tmp_path / "mode").write_text("quick\n")
    assert _optional().option("mode") == "slow"
    assert _optional(mode="quick").option("mode") == "quick"
    assert _optional(mode__file=f"{tmp_path}/mode").option("mode") == "quick"


def _private(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


def test_a_file_loses_its_last_newline_and_nothing_else(tmp_path: Path) -> None:
    _private(tmp_path / "key", b" two\nlines \n\n")
    assert _optional(key__file=f"{tmp_path}/key").option("key") == " two\nlines \n"


def test_an_option_whose_own_name_ends_like_that_is_itself(tmp_path: Path) -> None:
    assert _optional(cert__file="/no/such").option("cert.file") == "/no/such"


def test_a_secret_can_stand_in_no_uri(tmp_path: Path) -> None:
    with pytest.raises(BadURI, match=r"key is a secret, .*write key.file=PATH") as caught:
        _optional(key="hunter2")
    assert "hunter2" not in str(caught.value)


def test_what_a_file_says_is_never_printed(tmp_path: Path) -> None:
    (tmp_path / "mode").write_text("hunter2")
    _private(tmp_path / "key", b"hunter2")
    with pytest.raises(BadURI, match="what that file says is not understood; write mode=slow or") as caught:
        _optional(mode__file=f"{tmp_path}/mode")
    transport = _optional(key__file=f"{tmp_path}/key")
    assert "hunter2" not in f"{caught.value} {transport.uri} {transport.uri!r}"


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"\xff", "it is no text in UTF-8")],
)
def test_a_file_that_cannot_be_read_is_a_sentence(content: bytes | None, why: str, tmp_path: Path) -> None:
    if content is not None:
        _private(tmp_path / "key", content)
    with pytest.raises(BadURI, match=f"key.file: can't read .*: {why}"):
        _optional(key__file=f"{tmp_path}/key")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nonsense": "1"}, "odd has no option 'nonsense'; it knows mode, key, cert.file"),
        ({"nonsense.file": "1"}, "odd has no option 'nonsense'"),
        ({"mode": "other"}, "mode=other is not understood; write mode=slow or mode=quick"),
        ({"mode": "slow", "mode.file": "/dev/null"}, "gives 'mode' twice: by itself and by a file"),
    ],
)
def test_an_option_that_makes_no_sense_is_a_sentence(options: dict[str, str], why: str) -> None:
    with pytest.raises(BadURI, match=why):
        Optional(TransportURI("odd", "x", options))
