"""The page of ``kvmmig watch --web``: who may read it, what it is told, and that nobody holds it up."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio

import kvmmig
from kvmmig.cli.livepage import server
from kvmmig.cli.livepage.application import Application
from kvmmig.cli.livepage.history import History
from kvmmig.cli.livepage.looking import Looking
from kvmmig.cli.livepage.recordtail import RecordTail
from kvmmig.cli.livepage.server import serving
from kvmmig.cli.livepage.viewers import Viewers
from kvmmig.migration.events import Decided, PhaseBegun, encode_lines, sender_of
from kvmmig.migration.report import Phase
from tests.lab.example import begun
from tests.strangers import as_nobody, needs_second_user

from .test_progress_display import figures

PATIENCE = 60.0  # seconds for anything; a test that needs nearly so many has failed
Message = dict[str, Any]


def shown(messages: list[Message]) -> Message:
    """What a page shows that has had these, as its script does it."""
    page: Message = {}
    for message in messages:
        if message["kind"] == "whole":
            page = message
            continue
        page["now"] = message["now"]
        for name in ("samples", "rounds", "maps", "stalls", "happenings"):
            new = message.get(name, [])
            if name == "maps":
                page[name] = [row for row in page[name] if row[0] not in [each[0] for each in new]]
            page[name] = page[name] + new
    return page


def watched(url: str, until: Callable[[Message], object]) -> list[Message]:
    """The messages that a plain client gets, to the first one of which ``until`` is true."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    connection.request("GET", "/events")
    response = connection.getresponse()
    assert response.headers["content-type"] == "text/event-stream"
    messages: list[Message] = []
    try:
        while not messages or not until(messages[-1]):
            line = response.readline()
            assert line, "the stream has ended"
            if line.startswith(b"data: "):
                messages.append(json.loads(line[6:]))
    finally:
        response.close()
        connection.close()
    return messages


def answer(port: int, request: bytes, sock: socket.socket | None = None) -> tuple[int, dict[str, str], str]:
    """The status, the headers and the body that this request gets."""
    with sock or socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(request)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, dict(response.headers.items()), response.read().decode()


@asynccontextmanager
async def page(
    history: History | None = None, *, insecure: bool = False
) -> AsyncIterator[tuple[Viewers, str]]:
    viewers = Viewers(history or History())
    with trio.fail_after(PATIENCE):
        async with serving(Application(viewers, insecure=insecure), 0) as url:
            yield viewers, url


@asynccontextmanager
async def watched_machine(memory: str = "16MiB") -> AsyncIterator[tuple[kvmmig.QMPClient, Viewers, str]]:
    """A running guest, a client of its monitor, and the page of it."""
    history = History()
    async with (
        kvmmig.open_machine("dirtier", memory=memory, settings={"hot": "1MiB"}) as machine,
        kvmmig.Monitor(machine, "tcp:127.0.0.1:0") as monitor,
        kvmmig.QMPClient.connect(monitor.addresses[0]) as client,
        kvmmig.QMPClient.connect(monitor.addresses[0]) as eyes,
        page(history) as (viewers, url),
        trio.open_nursery() as nursery,
    ):
        await machine.start()
        nursery.start_soon(Looking(eyes, history, viewers).until_gone)
        yield client, viewers, url
        nursery.cancel_scope.cancel()


def has_ended(message: Message) -> bool:
    migration = message["now"]["migration"]
    return migration is not None and bool(migration["ended"])


@pytest.mark.kvm
async def test_all_browsers_see_a_real_migration_to_its_end(tmp_path: Path) -> None:
    found: list[list[Message]] = []

    async def watch(url: str) -> None:
        found.append(await trio.to_thread.run_sync(watched, url, has_ended))

    async with watched_machine() as (client, viewers, url):
        record = str(tmp_path / "a.jsonl")
        await client.execute("migrate-set-parameters", {"x-kvmmig-record": record})
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(watch, url)
            while len(viewers) < 3:  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.01)
            sink = "throttle+exec:cat > /dev/null?throttle.rate=20MB/s"
            await client.execute("migrate", {"uri": sink})
        figures: Message = await client.execute("x-kvmmig-query-migration")
    for messages in found:
        seen = shown(messages)
        now = seen["now"]["migration"]
        assert now["phase"] == "done"
        assert len(seen["rounds"]) == len(figures["rounds"]) + 1
        assert seen["rounds"][-1][4], "the last one is the final pass"
        assert 0.99 < sum(row[2] for row in seen["rounds"]) / figures["sent-bytes"] <= 1
        assert not any(seen["maps"][-1][1]), "nothing is pending at the end"
        assert sum(seconds for _, seconds, _ in now["parts"]) == pytest.approx(figures["downtime"], abs=0.01)
        texts = [text for _, text in seen["happenings"]]
        assert [text for text in texts if text in list(Phase)] == [
            *("setup", "rounds", "stop", "final", "commit", "handed-over", "done")
        ]
        assert len(messages) > 3, "it is told as it happens"


async def test_only_who_asks_for_this_host_by_its_name_is_answered() -> None:
    async with page() as (_, url):
        port = urlsplit(url).port or 0

        async def status(host: str, method: str = "GET", path: str = "/") -> int:
            request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            found, headers, _ = await trio.to_thread.run_sync(answer, port, request)
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers
            return found

        for host in (f"127.0.0.1:{port}", "localhost:8000", "LOCALHOST", "[::1]:80"):
            assert await status(host) == 200, host
        for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "127.0.0.1:x", ""):
            assert await status(host) == 403, host
            assert await status(host, path="/events") == 403, host
        for path in ("/page.js", "/charts.js", "/page.css"):
            assert await status("localhost", path=path) == 200
        for path in ("/page", "//page.js", "/../history.py", "/%2e%2e/history.py"):
            assert await status("localhost", path=path) == 404
        assert await status("localhost", "POST", "/events") == 405


@needs_second_user
@pytest.mark.parametrize(("insecure", "status"), [(False, 403), (True, 200)])
async def test_another_user_reads_it_only_where_that_was_said(insecure: bool, status: int) -> None:
    async with page(insecure=insecure) as (_, url):
        port = urlsplit(url).port or 0
        ours, theirs = socket.socketpair()

        def connect() -> None:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                socket.send_fds(theirs, [b"it"], [sock.fileno()])

        with ours, theirs, as_nobody(connect):
            _, (fd,), _, _ = socket.recv_fds(ours, 16, 1)
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        found, _, text = await trio.to_thread.run_sync(answer, port, request, socket.socket(fileno=fd))
    assert found == status, text
    assert insecure or "you are user 65534" in text


async def test_a_viewer_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmmig.cli.livepage.application._MOST_VIEWERS", 1)
    async with page() as (viewers, url):
        with viewers.present():
            request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
            found, _, text = await trio.to_thread.run_sync(answer, urlsplit(url).port or 0, request)
    assert (found, text) == (503, "kvmmig: 1 look already, and no more may\n")


async def test_a_browser_that_takes_nothing_does_not_keep_the_page_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_STALLED", 100)
    history = History()
    history.see_machine({"name": "a" * (16 << 20)})  # more than the kernel keeps
    async with page(history) as (viewers, url):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)) as sock:
            sock.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not len(viewers):  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.01)
            with trio.fail_after(PATIENCE / 2):
                while len(viewers):  # noqa: ASYNC110
                    await trio.sleep(0.01)


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    async with page() as (viewers, url):
        with pytest.raises(kvmmig.KvmmigError, match=r"port [0-9]+: another process listens there already"):
            async with serving(Application(viewers, insecure=False), urlsplit(url).port or 0):
                pass


async def test_a_slow_viewer_gets_all_of_it_in_the_place_of_what_it_missed() -> None:
    history = History()
    viewers = Viewers(history)
    with viewers.present() as viewer:
        assert json.loads((await viewer.next_message())[6:])["kind"] == "whole"
        viewers.publish()
        await viewer.next_message()
        for state in ("paused", "running", "paused"):
            history.see_machine({"status": state})
            viewers.publish()
            if state == "paused":
                continue
            late = json.loads((await viewer.next_message())[6:])
            assert (late["kind"], late["now"]["state"]) == ("whole", "running")
        last = json.loads((await viewer.next_message())[6:])
        assert (last["kind"], last["now"]["state"]) == ("news", "paused")


async def test_another_migration_takes_the_place_of_the_one_before() -> None:
    history = History()
    first = figures(Phase.ROUNDS, rate=1e6, dirty_rate=1e5, remaining_pages=10)
    history.see_figures(dataclasses.replace(first, setup_time=0.25, total_time=2.0))
    history.see_happening(1.0, "something")
    assert len(history.whole()["samples"]) == 1
    history.see_figures(dataclasses.replace(first, setup_time=0.25, total_time=3.0))
    assert len(history.whole()["samples"]) == 2
    history.see_figures(dataclasses.replace(first, setup_time=0.25, total_time=2.5))
    assert history.figures is not None
    assert history.figures.total_time == 3.0, "that reply was late"
    history.see_figures(dataclasses.replace(first, setup_time=0.5, total_time=4.0))
    assert len(history.whole()["samples"]) == 1
    assert history.whole()["happenings"] == []


async def test_a_long_migration_is_thinned_out() -> None:
    history = History()
    seen = figures(Phase.ROUNDS, rate=1e6, dirty_rate=1e5, remaining_pages=10)
    for second in range(5000):
        history.see_figures(dataclasses.replace(seen, setup_time=0.25, total_time=float(second)))
    samples = history.whole()["samples"]
    assert 300 <= len(samples) <= 600
    assert [samples[0][0], samples[-1][0]] == [0, 4999]


def test_a_record_is_read_as_it_is_written_and_only_what_this_machine_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    old, new = begun("source", 5.0), begun("source", 20.0, stream="f" * 32)
    foreign = begun("destination", 20.5)
    decided = [Decided(at=at, round=0, policy="p", decision="continue") for at in (6.0, 21.0, 22.0)]
    path.write_bytes(
        encode_lines([old, decided[0]], sender_of(old))
        + b"no event\n"
        + encode_lines([new, PhaseBegun(at=20.5, phase="rounds"), decided[1]], sender_of(new))
        + encode_lines([foreign, decided[0]], sender_of(foreign))
    )
    tail = RecordTail(str(path), pid=1, since=19.0)
    assert tail.new_events() == [(0.0, new), (1.0, decided[1])]
    assert RecordTail(str(path), pid=2, since=0.0).new_events() == []
    line = encode_lines([decided[2]], sender_of(new))
    with path.open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert tail.new_events() == []
        file.write(line[20:])
    assert tail.new_events() == [(2.0, decided[2])]


def test_what_is_about_the_page_needs_the_page(command: Callable[..., tuple[int, str, str]]) -> None:
    for option in (("--port", "8000"), ("--insecure",)):
        status, _, said = command("watch", "a", *option)
        assert status == 2
        assert "so add --web" in said
    status, _, said = command("watch", "a", "--web", "--port", "65536")
    assert status == 2
    assert "0 to 65535" in said
    status, _, said = command("watch", "a", "--web")
    assert status == 1
    assert "there is no machine 'a'" in said
