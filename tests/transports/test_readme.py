"""The guide keeps its word: its code runs, passes the suite, and its first transport has thirty lines."""

from __future__ import annotations

import io
import re
import tokenize
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvmmig.errors import BadURI
from kvmmig.testing import CHECKS, Call, Check, MemoryTransport, Plan, checks_for
from kvmmig.transport import Transport, TransportURI, Wrapper

_README = Path(__file__).parents[2] / "transports" / "README.md"
_BLOCKS = re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the guide's blocks define, one after the other."""
    names: dict[str, Any] = {}
    for number, block in enumerate(_BLOCKS):
        exec(compile(block, f"block {number} of the guide", "exec"), names)
    return names


def _wrapped(wrapper: type[Wrapper], name: str, options: dict[str, str] | None = None) -> Transport:
    uri = TransportURI("memory", "a", options or {}, (name,))
    return wrapper(uri, MemoryTransport(uri.unwrapped()[1]))


def code_lines(source: str) -> int:
    """Lines with code in them: no blank ones, no comments."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines: set[int] = set()
    for token in tokens:
        if token.type not in nothing and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def test_a_whole_transport_has_thirty_lines() -> None:
    assert "class LocalTransport(Transport)" in _BLOCKS[0]
    lines = code_lines(_BLOCKS[0])
    assert lines <= 30, lines


@pytest.mark.parametrize("check", CHECKS)
async def test_the_one_like_a_socket(check: Check, tmp_path: Path, names: dict[str, Any]) -> None:
    test: Callable[[Check, Path], Awaitable[None]] = names["test_local"]
    await test(check, tmp_path)


@pytest.mark.parametrize("check", CHECKS)
async def test_the_library_with_send_all(check: Check, tmp_path: Path, names: dict[str, Any]) -> None:
    uri = TransportURI("stream", str(tmp_path / "socket"))
    await check(lambda: names["StreamTransport"](uri))


@pytest.mark.parametrize("check", checks_for(stores=True))
async def test_the_store(check: Check, names: dict[str, Any]) -> None:
    names["shelves"].clear()
    await check(lambda: names["ShelfTransport"](TransportURI("shelf", "a")))


@pytest.mark.parametrize("check", CHECKS)
async def test_the_wrapper_that_reframes(check: Check, tmp_path: Path, names: dict[str, Any]) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("sesame\n")
    await check(lambda: _wrapped(names["SealWrapper"], "seal", {"seal.key.file": str(key)}))


def test_the_secret_can_not_be_given_in_the_uri(names: dict[str, Any]) -> None:
    with pytest.raises(BadURI, match=r"key is a secret"):
        _wrapped(names["SealWrapper"], "seal", {"seal.key": "sesame"})


@pytest.mark.parametrize("check", CHECKS)
async def test_the_wrapper_that_watches(check: Check, names: dict[str, Any]) -> None:
    test: Callable[[Check], Awaitable[None]] = names["test_watch"]
    await test(check)


async def test_the_wrapper_that_watches_with_any_cancels(names: dict[str, Any]) -> None:
    inner: Callable[..., Awaitable[None]] = names["test_watch_with_any_cancels"].hypothesis.inner_test
    await inner(plan=Plan(sends=(Call((100, 7), 0), Call((70_000,), None)), receives=(Call((10,), 1),)))


def test_what_is_registered_is_in_the_guide(names: dict[str, Any]) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", _README.read_text(), re.DOTALL)
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert list(groups) == ["kvmmig.transports", "kvmmig.wrappers"]
    for entries in groups.values():
        for target in entries.values():
            assert issubclass(names[target.partition(":")[2]], Transport)
