"""From a URI to a transport, or to a sentence that helps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.errors import BadURI, ChannelBroken, TransportError
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import (
    AnyChannel,
    Channel,
    Listener,
    Option,
    Side,
    Transport,
    TransportURI,
    Wrapper,
    registry,
)


class Nowhere(Transport):
    options = (Option("speed", "how fast", "slow", ("slow", "fast")), Option("note", "any text"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes it a context

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes it a context


@pytest.fixture(autouse=True)
def _only_for_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_registered_wrappers", {})


@pytest.mark.parametrize(
    ("text", "scheme", "target", "options"),
    [
        ("tcp:127.0.0.1:4444", "tcp", "127.0.0.1:4444", {}),
        ("pipe:/a/b.img?direct=on", "pipe", "/a/b.img", {"direct": "on"}),
        ("pipe:/a?helper=/x/y%20z&direct=off", "pipe", "/a", {"helper": "/x/y z", "direct": "off"}),
        ("file:/odd?name", "file", "/odd?name", {}),
        ("exec:test -f /a? && cat", "exec", "test -f /a? && cat", {}),
        ("file:", "file", "", {}),
    ],
)
def test_a_uri_is_taken_apart(text: str, scheme: str, target: str, options: dict[str, str]) -> None:
    uri = TransportURI.parse(text)
    assert (uri.scheme, uri.target, dict(uri.options)) == (scheme, target, options)


@pytest.mark.parametrize("text", ["", "tcp", "/a/file", ":x", "TCP:x", "a b:x", "tcp+:x", "+tcp:x"])
def test_what_is_no_uri_is_told_what_one_looks_like(text: str) -> None:
    with pytest.raises(BadURI, match=r"write scheme:target, such as tcp:"):
        TransportURI.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_a_uri_or_a_bad_uri(text: str) -> None:
    try:
        registry.transport_for(text)
    except BadURI as error:
        assert str(error)  # noqa: PT017  # hypothesis: either outcome is right


def test_wrappers_are_kept_in_order() -> None:
    assert TransportURI.parse("a+b+tcp:x").wrappers == ("a", "b")


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(
        BadURI, match=r"no transport is called 'carrier'; there are exec, fd, file, pipe, tcp, unix"
    ):
        registry.transport_for("carrier:pigeon")


def test_an_unknown_wrapper_is_an_error() -> None:
    there_are = "there are checksum, fault, secret, tap, throttle, tls, zstd"
    with pytest.raises(BadURI, match=f"no wrapper is called 'turbo'; {there_are}"):
        registry.transport_for("turbo+tcp:127.0.0.1:1")


class Layer(Wrapper):
    options = (Option("depth", "how deep", "1"), Option("kind", "which", "a", ("a", "b")))

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        raise ChannelBroken("it does not hold")
        yield  # type: ignore[unreachable]  # makes it a context


def test_wrappers_stand_around_the_transport_outermost_first_and_each_gets_its_own_options() -> None:
    for name in ("outer", "inner"):
        registry.register_wrapper(name, Layer)
    registry.register("nowhere", Nowhere)
    outer = registry.transport_for("outer+inner+nowhere:x?inner.depth=2&speed=fast&outer.kind=b")
    assert isinstance(outer, Layer)
    assert isinstance(outer.inner, Layer)
    assert isinstance(outer.inner.inner, Nowhere)
    assert (outer.option("depth"), outer.option("kind")) == ("1", "b")
    assert (outer.inner.option("depth"), outer.inner.option("kind")) == ("2", "a")
    assert outer.inner.inner.option("speed") == "fast"
    assert str(outer.inner.inner.uri) == "nowhere:x?speed=fast"


def test_a_wrapper_given_twice_or_with_a_wrong_option_is_an_error() -> None:
    registry.register_wrapper("layer", Layer)
    with pytest.raises(BadURI, match="has the wrapper 'layer' twice"):
        registry.transport_for("layer+layer+tcp:127.0.0.1:1")
    with pytest.raises(BadURI, match="layer has no option 'width'; it knows depth, kind"):
        registry.transport_for("layer+tcp:127.0.0.1:1?layer.width=1")
    with pytest.raises(BadURI, match="write kind=a or kind=b"):
        registry.transport_for("layer+tcp:127.0.0.1:1?layer.kind=c")
    with pytest.raises(BadURI, match=r"tcp has no option 'other\.depth'"):
        registry.transport_for("layer+tcp:127.0.0.1:1?other.depth=1")


async def test_a_wrapper_that_fails_leaves_no_channel() -> None:
    ends = memory_channel_pair()

    class Somewhere(Nowhere):
        @asynccontextmanager
        async def connect(self) -> AsyncIterator[Channel]:
            async with ends[0]:
                yield ends[0]

    registry.register("somewhere", Somewhere)
    registry.register_wrapper("layer", Layer)
    with pytest.raises(ChannelBroken, match="it does not hold"):
        async with registry.transport_for("layer+somewhere:x").connect():
            pytest.fail("it connected")
    with pytest.raises(ChannelBroken, match="the other side has closed it"):
        await ends[1].receive_some(memoryview(bytearray(1)))


def test_an_installed_packages_wrapper_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("odd", "json:dumps", registry.WRAPPERS_GROUP)
    offered = {registry.WRAPPERS_GROUP: (entry,)}
    monkeypatch.setattr(registry, "entry_points", lambda group: offered.get(group, ()))
    with pytest.raises(TransportError, match=r"the wrapper 'odd' .* is no Wrapper; derive it from"):
        registry.transport_for("odd+tcp:127.0.0.1:1")


def test_an_option_given_twice_or_unknown_or_wrong_is_an_error() -> None:
    registry.register("nowhere", Nowhere)
    with pytest.raises(BadURI, match="twice"):
        registry.transport_for("nowhere:x?speed=slow&speed=fast")
    with pytest.raises(BadURI, match="no option 'sped'; it knows speed, note"):
        registry.transport_for("nowhere:x?sped=slow")
    with pytest.raises(BadURI, match="write speed=slow or speed=fast"):
        registry.transport_for("nowhere:x?speed=warp")


def test_options_have_defaults() -> None:
    registry.register("nowhere", Nowhere)
    assert registry.transport_for("nowhere:x").option("speed") == "slow"
    assert registry.transport_for("nowhere:x?note=a%26b").option("note") == "a&b"


def test_an_installed_packages_transport_is_found_and_a_broken_one_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = (
        EntryPoint("good", f"{__name__}:Nowhere", registry.GROUP),
        EntryPoint("gone", "no_such_module:X", registry.GROUP),
        EntryPoint("odd", "json:dumps", registry.GROUP),
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__)
    )
    monkeypatch.setattr(sys.modules[__name__], "Nowhere", Nowhere, raising=False)
    assert isinstance(registry.transport_for("good:x"), Nowhere)
    with pytest.raises(TransportError, match=r"'gone' \(no_such_module:X\) can't be loaded"):
        registry.transport_for("gone:x")
    with pytest.raises(TransportError, match="is no Transport"):
        registry.transport_for("odd:x")


def test_looking_up_one_transport_imports_no_other() -> None:
    code = (
        "import sys; from kvmmig.transport.registry import transport_for; transport_for('tcp:127.0.0.1:1');"
        "print([s for s in ('tcp', 'pipe', 'file') if f'kvmmig_transports.{s}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tcp']"
