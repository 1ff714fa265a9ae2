"""``tls+``: whom it lets in, whom it goes to, and what each side says when it does not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trustme

from kvmmig.errors import BadURI, ChannelBroken, ConnectFailed, TransportError
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import Channel, Side, TransportURI, transport_for
from kvmmig_transports.tls import TlsWrapper
from tests.transports import certificates
from tests.transports.using import receive_exactly, send_all

Make = Callable[..., Path]


@pytest.fixture
def pki(tmp_path: Path) -> Make:
    """Directories by name; with one CA unless told otherwise."""
    ca = trustme.CA()

    def make(name: str = "pki", **how: object) -> Path:
        return certificates.make(tmp_path / name, **{"ca": ca, **how})  # type: ignore[arg-type]  # as the test says

    return make


def tls(target: str, where: Path, **options: str) -> TransportURI:
    named = {f"tls.{name}": value for name, value in options.items()}
    return TransportURI("tcp", target, {"tls.dir": str(where), **named}, ("tls",))


async def meet(
    destination: TransportURI, source: TransportURI, caplog: pytest.LogCaptureFixture
) -> tuple[str, str]:
    """What each side says: the source in its error, the destination in its log, for it goes on listening."""
    caplog.set_level(logging.INFO, "kvmmig.transport")
    heard: list[str] = []

    async def accept() -> None:
        async with listener.accept() as channel:
            heard.append(channel.peer)
            assert isinstance(channel, Channel)
            await send_all(channel, b"welcome")
            await channel.aclose()

    with trio.fail_after(20):
        async with transport_for(destination).listen() as listener, trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            port = listener.uri.target.rpartition(":")[2]
            target = source.target.replace(":0", f":{port}")
            uri = TransportURI(source.scheme, target, source.options, source.wrappers)
            try:
                async with transport_for(uri).connect() as channel:
                    assert isinstance(channel, Channel)
                    assert await receive_exactly(channel, 7) == b"welcome"
                    said = f"welcome from {channel.peer}"
            except ConnectFailed as error:
                said = str(error)
                while not any("passed over" in message for message in caplog.messages):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
    return said, heard[0] if heard else next(m for m in caplog.messages if "passed over" in m)


async def test_each_side_knows_the_other_by_its_certificate(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    said, heard = await meet(tls("127.0.0.1:0", where), tls("127.0.0.1:0", where), caplog)
    assert re.fullmatch(r"welcome from 127\.0\.0\.1:\d+ \(kvmmig\.example\)", said)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ \(kvmmig\.example\)", heard)
    assert any("is kvmmig.example, by its certificate" in message for message in caplog.messages)


LATE = datetime.now(UTC) - timedelta(days=1)
WRONG = [
    pytest.param(
        {},
        {"trusts": "another"},
        "its certificate is not signed by the CA in ca-cert.pem",
        "it refuses this side's certificate: it does not know the CA that signed it",
        id="the source does not know the destination's CA",
    ),
    pytest.param(
        {"trusts": "another"},
        {},
        "it refuses this side's certificate: it does not know the CA that signed it",
        "its certificate is not signed by the CA in ca-cert.pem",
        id="the destination does not know the source's CA",
    ),
    pytest.param(
        {"until": LATE},
        {},
        "its certificate has expired",
        "it refuses this side's certificate: it has expired, or is not valid yet",
        id="the destination's has expired",
    ),
    pytest.param(
        {},
        {"until": LATE},
        "it refuses this side's certificate: it has expired, or is not valid yet",
        "its certificate has expired",
        id="the source's has expired",
    ),
    pytest.param(
        {"names": ("other.example",)},
        {},
        "its certificate is not accepted: IP address mismatch, certificate is not valid for '127.0.0.1'",
        "it refuses this side's certificate: it is damaged, or for another name",
        id="the destination's is for another name",
    ),
]


@pytest.mark.parametrize(("destinations", "sources", "said", "heard"), WRONG)
async def test_a_wrong_certificate_is_said_on_both_sides(
    destinations: dict[str, object],
    sources: dict[str, object],
    said: str,
    heard: str,
    pki: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for how in (destinations, sources):
        if how.get("trusts") == "another":
            how["trusts"] = trustme.CA()
    to, by = pki("destination", **destinations), pki("source", **sources)
    at_source, at_destination = await meet(tls("127.0.0.1:0", to), tls("127.0.0.1:0", by), caplog)
    assert re.fullmatch(rf"no TLS connection with 127\.0\.0\.1:\d+: {re.escape(said)}", at_source)
    assert re.fullmatch(
        rf"a client was passed over: no TLS connection with \S+: {re.escape(heard)}", at_destination
    )


async def test_a_source_without_a_certificate_is_not_let_in(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    said, heard = await meet(tls("127.0.0.1:0", where), tls("127.0.0.1:0", where, mutual="off"), caplog)
    assert said.endswith("it wants a certificate, and this side shows none")
    assert heard.endswith("it shows no certificate, and must")


async def test_a_destination_may_take_sources_without_one(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    to, by = tls("127.0.0.1:0", where, mutual="off"), tls("127.0.0.1:0", where, mutual="off")
    said, heard = await meet(to, by, caplog)
    assert said.startswith("welcome from")
    assert "(" not in heard


async def test_the_source_checks_another_name_or_the_fingerprint(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    to = pki(names=("other.example",))
    right = certificates.fingerprint(to / "server-cert.pem")
    for options in ({"host": "other.example"}, {"fingerprint": right}, {"fingerprint": right.upper()}):
        said, _ = await meet(tls("127.0.0.1:0", to), tls("127.0.0.1:0", to, **options), caplog)
        assert said.startswith("welcome from")
    said, heard = await meet(tls("127.0.0.1:0", to), tls("127.0.0.1:0", to, fingerprint="0" * 64), caplog)
    assert said.endswith(": the certificate is not the one with the fingerprint that is expected")
    assert heard.endswith(": it says: the certificate is not the one with the fingerprint that is expected")


async def test_the_destination_checks_the_name_or_the_fingerprint(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    right = certificates.fingerprint(where / "client-cert.pem")
    for options in ({"host": certificates.NAME}, {"fingerprint": right}):
        said, _ = await meet(tls("127.0.0.1:0", where, **options), tls("127.0.0.1:0", where), caplog)
        assert said.startswith("welcome from")
    said, heard = await meet(
        tls("127.0.0.1:0", where, host="other.example"), tls("127.0.0.1:0", where), caplog
    )
    assert said.endswith(": it says: the certificate is not for other.example")
    assert heard.endswith(": the certificate is not for other.example")


async def test_a_source_without_tls_is_passed_over_and_the_next_one_is_welcome(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    async with transport_for(tls("127.0.0.1:0", where)).listen() as listener, trio.open_nursery() as nursery:

        async def accept() -> None:
            async with listener.accept() as channel:
                assert await receive_exactly(channel, 5) == b"hello"

        nursery.start_soon(accept)
        async with transport_for(TransportURI("tcp", listener.uri.target)).connect() as plain:
            await send_all(plain, b"kvmmig stream, in the clear")
            with trio.fail_after(10):
                while not caplog.messages:
                    await trio.lowlevel.checkpoint()
            plain.abort()
        async with transport_for(tls(listener.uri.target, where)).connect() as channel:
            await send_all(channel, b"hello")
    assert any(m.endswith("it does not speak TLS; is tls+ in its URI too?") for m in caplog.messages)


async def test_a_destination_without_tls_is_said_to_the_source(pki: Make) -> None:
    async with transport_for("tcp:127.0.0.1:0").listen() as listener, trio.open_nursery() as nursery:

        async def accept(answer: bytes) -> None:
            async with listener.accept() as channel:
                assert isinstance(channel, Channel)
                await receive_exactly(channel, 1)
                with suppress(TransportError):
                    await send_all(channel, answer)
                    await channel.aclose()

        for answer, reason in (
            (b"not what a TLS server says", r"it does not speak TLS; is tls\+ in its URI too\?"),
            (b"", r"is tls\+ in its URI too\?|cut the connection"),
        ):
            nursery.start_soon(accept, answer)
            with pytest.raises(ConnectFailed, match=reason):
                async with transport_for(tls(listener.uri.target, pki())).connect():
                    pass


async def test_a_silent_client_is_bounded(
    pki: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TlsWrapper, "handshake_timeout", 0.2)
    async with transport_for(tls("127.0.0.1:0", pki())).listen() as listener, trio.open_nursery() as nursery:

        async def accept() -> None:
            async with listener.accept():
                raise AssertionError("nobody has said anything")

        nursery.start_soon(accept)
        async with transport_for(TransportURI("tcp", listener.uri.target)).connect() as silent:
            with trio.fail_after(10):
                while not caplog.messages:
                    await trio.lowlevel.checkpoint()
            silent.abort()
        nursery.cancel_scope.cancel()
    assert caplog.messages[0].endswith("did not finish the handshake of tls+ within 0.2 s")


async def _over_memory(where: Path, cut: int | None) -> bytes:
    """All that arrives of 3,000,000 bytes where the stream below ends after ``cut`` of them."""
    there, here = memory_channel_pair()
    middle_in, middle_out = memory_channel_pair()
    uri = TransportURI("tcp", "127.0.0.1:0", {"tls.dir": str(where)}, ("tls",))
    wrapper = transport_for(uri)
    assert isinstance(wrapper, TlsWrapper)
    got = bytearray()

    async def forward(source: Channel, destination: Channel, most: int) -> None:
        buffer = memoryview(bytearray(10_000))
        while most and (count := await source.receive_some(buffer[:most])):
            await send_all(destination, bytes(buffer[:count]))
            most -= count
        await destination.aclose()

    async def send() -> None:
        async with wrapper.wrap(there, side=Side.SOURCE) as channel:
            assert isinstance(channel, Channel)
            with suppress(TransportError):
                await send_all(channel, bytes(3_000_000))
                await channel.aclose()

    async def receive() -> None:
        async with wrapper.wrap(middle_out, side=Side.DESTINATION) as channel:
            assert isinstance(channel, Channel)
            buffer = memoryview(bytearray(1 << 20))
            while count := await channel.receive_some(buffer):
                got.extend(buffer[:count])
            channel.abort()

    async def back() -> None:
        buffer = memoryview(bytearray(10_000))
        with suppress(TransportError):  # both ways end at once
            while count := await middle_in.receive_some(buffer):
                await send_all(here, bytes(buffer[:count]))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(back)
            nursery.start_soon(forward, here, middle_in, cut or 1 << 40)
            await receive()
            nursery.cancel_scope.cancel()
    return bytes(got)


async def test_a_stream_that_is_cut_is_an_error_and_no_end(pki: Make) -> None:
    where = pki()
    assert await _over_memory(where, None) == bytes(3_000_000)
    with pytest.RaisesGroup(pytest.RaisesExc(ChannelBroken, match="was cut off: the connection ended, and")):
        await _over_memory(where, 1_000_000)


async def test_bytes_that_are_changed_on_the_way_are_an_error(pki: Make) -> None:
    where = pki()
    uri = TransportURI("tcp", "127.0.0.1:0", {"tls.dir": str(where)}, ("tls",))
    faulty = TransportURI(
        "tcp",
        "127.0.0.1:0",
        {"tls.dir": str(where), "fault.what": "corrupt", "fault.at": "1MiB"},
        ("tls", "fault"),
    )
    async with transport_for(uri).listen() as listener, trio.open_nursery() as nursery:

        async def send() -> None:
            to = TransportURI("tcp", listener.uri.target, faulty.options, faulty.wrappers)
            async with transport_for(to).connect() as channel:
                with suppress(TransportError):
                    await send_all(channel, bytes(4 << 20))
                    await trio.sleep_forever()

        nursery.start_soon(send)
        async with listener.accept() as channel:
            with (
                pytest.raises(ChannelBroken, match="is broken: bytes were changed on the way"),
                trio.fail_after(20),
            ):
                await receive_exactly(channel, 4 << 20)
            channel.abort()
        nursery.cancel_scope.cancel()


async def _refusal(uri: TransportURI) -> str:
    with pytest.raises(ConnectFailed) as caught:
        async with transport_for(uri).listen():
            pass
    return str(caught.value)


async def test_a_key_that_others_can_read_is_refused(pki: Make) -> None:
    where = pki("it's mine")
    (where / "server-key.pem").chmod(0o640)
    refusal = await _refusal(tls("127.0.0.1:0", where))
    assert "server-key.pem is open to other users (mode 0640); make it private by chmod 600 '" in refusal
    assert """it'"'"'s mine""" in refusal


async def test_files_that_are_missing_or_no_certificates_are_named(pki: Make) -> None:
    where = pki()
    (where / "server-cert.pem").write_text("not a certificate")
    assert f"{where}/server-cert.pem and {where}/server-key.pem are no pair in PEM" in await _refusal(
        tls("127.0.0.1:0", where)
    )
    (where / "ca-cert.pem").write_text("not a certificate")
    assert f"{where}/ca-cert.pem holds no certificate in PEM" in await _refusal(tls("127.0.0.1:0", where))
    (where / "ca-cert.pem").unlink()
    assert f"can't read {where}/ca-cert.pem: there is no such file" in await _refusal(
        tls("127.0.0.1:0", where)
    )


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("tls+tcp:127.0.0.1:1", "say where the certificates are, by tls.dir=PATH"),
        ("tls+tcp:127.0.0.1:1?tls.dir=/x&tls.fingerprint=12", "64 hex digits of a SHA-256"),
        ("tls+file:/tmp/x?tls.dir=/x", r"tls\+ needs somebody at the other end, and file: only stores"),
        ("tls+tcp:127.0.0.1:1?tls.dir=/x&tls.mutual=perhaps", "write mutual=on or mutual=off"),
    ],
)
def test_what_makes_no_sense_is_no_uri(uri: str, sentence: str) -> None:
    with pytest.raises(BadURI, match=sentence):
        transport_for(uri)


async def test_a_source_must_know_whom_it_goes_to(pki: Make, tmp_path: Path) -> None:
    uri = TransportURI("unix", f"{tmp_path}/a.sock", {"tls.dir": str(pki())}, ("tls",))
    with pytest.raises(ConnectFailed, match="nothing says whose certificate it must be; add "):
        async with transport_for(uri).connect():
            pass


async def test_strangers_at_one_listener_silence_no_other(
    pki: Make, caplog: pytest.LogCaptureFixture
) -> None:
    where = pki()
    for _ in range(15):
        caplog.clear()
        _, heard = await meet(
            tls("127.0.0.1:0", where), tls("127.0.0.1:0", where, fingerprint="0" * 64), caplog
        )
        assert "the certificate is not the one with the fingerprint" in heard
