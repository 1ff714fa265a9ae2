"""``secret+``: nobody without the secret gets in, or is gone to, and each side says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import Channel, Side, TransportURI, transport_for
from kvmmig_transports.secret import SecretWrapper
from tests.transports.using import receive_exactly, send_all


def secret(tmp_path: Path, text: str) -> SecretWrapper:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(0o600)
    made = transport_for(TransportURI("tcp", "127.0.0.1:0", {"secret.key.file": str(path)}, ("secret",)))
    assert isinstance(made, SecretWrapper)
    return made


async def says(wrapper: SecretWrapper, channel: Channel, side: Side) -> str:
    """Empty where the other side has proved itself."""
    try:
        async with wrapper.wrap(channel, side=side):
            return ""
    except ConnectFailed as error:
        return str(error)


async def both_say(source: SecretWrapper, destination: SecretWrapper, *channels: Channel) -> tuple[str, str]:
    there, here = channels or memory_channel_pair()
    said: dict[Side, str] = {}

    async def run(wrapper: SecretWrapper, channel: Channel, side: Side) -> None:
        said[side] = await says(wrapper, channel, side)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, source, there, Side.SOURCE)
            nursery.start_soon(run, destination, here, Side.DESTINATION)
    return said[Side.SOURCE], said[Side.DESTINATION]


async def test_who_knows_the_same_secret_is_let_in(tmp_path: Path) -> None:
    one = secret(tmp_path, "the secret of both\n")
    assert await both_say(one, secret(tmp_path, "the secret of both")) == ("", "")


async def test_another_secret_is_said_on_both_sides(tmp_path: Path) -> None:
    source, destination = secret(tmp_path, "the secret of both"), secret(tmp_path, "the secret of none")
    assert await both_say(source, destination) == (
        "memory/b says that this side does not know the secret; do both have the same file?",
        "memory/a does not know the secret, or somebody stands between it and this side",
    )


async def test_a_proof_is_bound_to_the_channel(tmp_path: Path) -> None:
    one = secret(tmp_path, "the secret of both")
    there, here = memory_channel_pair()
    there.binding = here.binding = b"this connection"
    assert await both_say(one, one, there, here) == ("", "")
    there, here = memory_channel_pair()
    there.binding, here.binding = b"this connection", b"that connection"
    assert (await both_say(one, one, there, here))[1].endswith("somebody stands between it and this side")


async def test_a_binding_passes_through_the_wrappers_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, _ = memory_channel_pair()
    channel.binding = b"this connection"
    delayed = transport_for("throttle+tcp:127.0.0.1:0?throttle.latency=1ms")
    assert hasattr(delayed, "wrap")
    async with delayed.wrap(channel, side=Side.SOURCE) as wrapped:
        assert wrapped.binding == b"this connection"
        wrapped.abort()


async def test_a_destination_that_only_repeats_does_not_prove_anything(tmp_path: Path) -> None:
    """The source's own words, sent back to it, are no proof."""
    there, here = memory_channel_pair()
    one = secret(tmp_path, "the secret of both")
    said: list[str] = []

    async def source() -> None:
        said.append(await says(one, there, Side.SOURCE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source)
        await send_all(here, await receive_exactly(here, 48))
        await send_all(here, b"y" + await receive_exactly(here, 32))
        assert await receive_exactly(here, 1) == b"n"
    assert said == ["memory/b does not know the secret, or somebody stands between it and this side"]


async def test_a_source_gets_no_proof_to_guess_from_before_it_has_proved_itself(tmp_path: Path) -> None:
    there, here = memory_channel_pair()
    one = secret(tmp_path, "the secret of both")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(says, one, here, Side.DESTINATION)
        await send_all(there, b"kvmmig secret 1\n" + bytes(32))
        await receive_exactly(there, 48)
        await send_all(there, bytes(32))
        assert await receive_exactly(there, 1) == b"n"
        assert await there.receive_some(memoryview(bytearray(100))) == 0


async def test_who_speaks_of_no_secret_is_told_and_the_listener_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvmmig.transport")
    one = secret(tmp_path, "the secret of both")
    with trio.fail_after(20):
        async with one.listen() as listener, trio.open_nursery() as nursery:

            async def accept() -> None:
                async with listener.accept() as channel:
                    assert await receive_exactly(channel, 5) == b"hello"

            nursery.start_soon(accept)
            async with transport_for(listener.uri).connect() as stranger:
                await send_all(stranger, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while not caplog.messages:
                    await trio.lowlevel.checkpoint()
                stranger.abort()
            uri = TransportURI("tcp", listener.uri.target, one.uri.options, one.uri.wrappers)
            async with transport_for(uri).connect() as channel:
                await send_all(channel, b"hello")
    assert caplog.messages[0].endswith("does not speak of a secret; is secret+ in its URI too?")
    assert any(message.endswith(" knows the secret") for message in caplog.messages)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("short", "the secret has 5 bytes and must have 16 at least; make one by openssl rand -hex 32"),
        ("", "say where the secret is, by secret.key.file=PATH"),
    ],
)
def test_a_secret_that_can_be_guessed_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadURI, match=sentence):
        secret(tmp_path, text)


def test_a_secret_never_stands_in_a_uri_nor_in_a_file_that_others_can_read(tmp_path: Path) -> None:
    with pytest.raises(BadURI, match=r"put it into a file and write key\.file=PATH"):
        transport_for("secret+tcp:127.0.0.1:1?secret.key=the-secret-of-both")
    one = secret(tmp_path, "the secret of both")
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(BadURI, match=r"is open to other users \(mode 0644\); make it private by chmod 600"):
        transport_for(one.uri)


def test_a_store_knows_no_secret() -> None:
    with pytest.raises(BadURI, match=r"secret\+ needs somebody at the other end, and file: only stores"):
        transport_for("secret+file:/tmp/a")
