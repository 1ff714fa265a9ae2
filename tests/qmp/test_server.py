"""What a client sees of a monitor."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio

from kvmmig.qmp import Arguments, CommandTable, QMPServer, Session
from kvmmig.qmp.outbox import Outbox

from .conftest import PATIENCE, Commands, Served, error

PARSE = "JSON parse error, "


async def test_it_greets_and_wants_to_negotiate_first(served: Served) -> None:
    client = await served.raw()
    version = {"qemu": {"major": 0, "minor": 4, "micro": 1}, "package": "kvmmig 0.4.1"}
    assert await client.next() == {"QMP": {"version": version, "capabilities": []}}
    too_early = error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound", id=1)
    for command in ("hello", "nonsense"):
        assert await client.ask({"execute": command, "id": 1}) == too_early
    assert await client.ask({"execute": "qmp_capabilities", "arguments": {"enable": []}}) == {"return": {}}
    assert await client.ask({"execute": "hello"}) == {"return": {}}
    assert await client.ask({"execute": "qmp_capabilities"}) == error(
        "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
    )


async def test_it_says_what_it_can(served: Served) -> None:
    client = await served.negotiated()
    names = [command["name"] for command in (await client.ask({"execute": "query-commands"}))["return"]]
    assert names == sorted(names)
    assert {"qmp_capabilities", "query-commands", "getfd", "closefd", "echo"} <= set(names)


@pytest.mark.parametrize(
    "request_id", ["a", 17, 1.5, None, True, {"a": [1, {"b": "\u00e9"}]}, 123456789012345678901234567890]
)
async def test_an_id_comes_back_as_it_was_sent(served: Served, request_id: object) -> None:
    client = await served.negotiated()
    assert await client.ask({"execute": "hello", "id": request_id}) == {"return": {}, "id": request_id}
    assert (await client.ask({"id": request_id, "execute": "no"}))["id"] == request_id
    assert (await client.ask({"id": request_id, "execute": 3}))["id"] == request_id
    assert (await client.ask({"id": request_id}))["id"] == request_id
    spread = json.dumps({"execute": "hello", "id": request_id}, indent=1)
    assert (await client.ask(spread))["id"] == request_id


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("{}", "QMP input lacks member 'execute'"),
        ('{"arguments": {}}', "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "echo", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "echo", "control": {}}', "QMP input member 'control' is unexpected"),
        ('{"exec-oob": "hello"}', "QMP input member 'exec-oob' is unexpected"),
        ("[]", "QMP input must be a JSON object"),
        ("7\n", "QMP input must be a JSON object"),
        ("hello\n", PARSE + "stray 'h': a message is an object, and begins with '{'"),
        ('{"execute": "hello",}', PARSE),
        ('{"execute": "hello"]', PARSE),
        (b'{"execute": "hello", "id": "\xe9"}', PARSE + "a string is not UTF-8"),
        (b'{"execute": "echo", "arguments": {"text": "\\ud800"}}', PARSE),
    ],
)
async def test_what_is_no_request_is_an_error_and_the_next_one_is_answered(
    served: Served, text: bytes | str, desc: str
) -> None:
    client = await served.negotiated()
    reply = await client.ask(text)
    assert reply["error"]["class"] == "GenericError"
    assert reply["error"]["desc"].startswith(desc)
    assert await client.ask({"execute": "hello", "id": 1}) == {"return": {}, "id": 1}


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("{'execute': 'echo', 'arguments': {'text': 'a'}}", "a"),
        ("""{'execute': "echo", "arguments": {'text': 'it\\'s "so" \\"'}}""", 'it\'s "so" "'),
        ("""{"execute": "echo", "arguments": {"text": "it's \\'so\\' {'"}}""", "it's 'so' {'"),
        ("""{'execute': 'echo', 'arguments': {'text': '{"a": [\\u00fc'}}""", '{"a": [\u00fc'),
        ('{"execute": "echo", "arguments": {"text": "' + 5000 * "'" + '"}}', 5000 * "'"),
    ],
)
@pytest.mark.parametrize("step", [7, 1 << 16])
async def test_strings_in_single_quotes_mean_what_they_mean_to_qemu(
    served: Served, text: str, heard: str, step: int
) -> None:
    client = await served.negotiated()
    with trio.fail_after(PATIENCE):
        for at in range(0, len(text), step):
            await client.send(text[at : at + step])
        assert (await client.next())["return"] == {"text": heard}


async def test_nothing_is_answered_behind_the_end_of_a_session(served: Served, commands: Commands) -> None:
    async def end(session: Session, _: object) -> None:
        session.ended = True

    commands.table.add("end", None, end)
    client = await served.negotiated()
    await client.send(b'{"execute": "end", "id": 1} {"execute": "hello", "id": 2}')
    assert await client.next() == {"return": {}, "id": 1}
    assert await client.line() == b""


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        ({}, "Parameter 'text' is missing"),
        ({"text": 1}, "Invalid parameter type for 'text', expected: string"),
        ({"text": None}, "Invalid parameter type for 'text', expected: string"),
        ({"text": "", "number": "1"}, "Invalid parameter type for 'number', expected: integer"),
        ({"text": "", "number": 1.5}, "Invalid parameter type for 'number', expected: integer"),
        ({"text": "", "number": True}, "Invalid parameter type for 'number', expected: integer"),
        ({"text": "", "max-size": "1"}, "Invalid parameter type for 'max-size', expected: number"),
        (
            {"text": "", "max_size": 1},
            "Parameter 'max_size' is unexpected; there are text, number, max-size, switches",
        ),
        ({"text": "", "switches": 1}, "Invalid parameter type for 'switches', expected: array"),
        (
            {"text": "", "switches": [True, 1]},
            "Invalid parameter type for 'switches[1]', expected: boolean",
        ),
    ],
)
async def test_wrong_arguments_are_named(served: Served, arguments: dict[str, Any], desc: str) -> None:
    client = await served.negotiated()
    assert await client.ask({"execute": "echo", "arguments": arguments}) == error(desc)


async def test_a_command_without_arguments_takes_none(served: Served) -> None:
    client = await served.negotiated()
    request = {"execute": "hello", "arguments": {"a": 1}}
    assert await client.ask(request) == error("Parameter 'a' is unexpected; there are none")


def test_a_schema_that_would_take_anything_is_no_schema() -> None:
    class Loose(msgspec.Struct):
        pass

    async def handler(*_: object) -> None: ...

    table = CommandTable()
    with pytest.raises(TypeError, match="Loose would take unknown arguments"):
        table.add("loose", Loose, handler)
    table.command("strict", Arguments)(handler)
    with pytest.raises(ValueError, match="there is a command 'strict' already"):
        table.add("strict", None, handler)


async def test_a_failed_command_is_an_error_and_a_bug_is_too(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    client = await served.negotiated()
    assert await client.ask({"execute": "refuse"}) == error("the machine is asleep; wake it up first")
    assert await client.ask({"execute": "gone"}) == error("Device 'x' not found", "DeviceNotFound")
    missing = error("The command nonsense has not been found", "CommandNotFound")
    assert await client.ask({"execute": "nonsense"}) == missing
    bug = error("a bug in kvmmig: ZeroDivisionError: of all things")
    assert await client.ask({"execute": "bug"}) == bug
    assert "ZeroDivisionError" in caplog.text
    assert await client.ask({"execute": "hello"}) == {"return": {}}


async def test_a_clients_own_long_words_do_not_come_back_whole(served: Served) -> None:
    client = await served.negotiated()
    for request in ({"execute": "x" * 60_000}, {"execute": "hello", "arguments": {"x" * 60_000: 1}}):
        assert len((await client.ask(request))["error"]["desc"]) < 200


async def test_pipelined_commands_are_answered_in_order(served: Served) -> None:
    client = await served.negotiated()
    requests = [{"execute": "echo", "arguments": {"text": str(i)}, "id": i} for i in range(2000)]
    await client.send("".join(json.dumps(request) for request in requests))
    for i in range(2000):
        assert await client.next() == {"return": {"text": str(i)}, "id": i}


async def test_a_client_that_pipelines_leaves_most_of_the_loop_to_others(
    served: Served, nursery: trio.Nursery
) -> None:
    """The same loop moves a guest."""
    client = await served.negotiated()
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    nursery.start_soon(work)
    nursery.start_soon(client.send, '{"execute": "hello"}' * 2000)
    for _ in range(2000):
        assert await client.next() == {"return": {}}
    assert turns > 1000


async def test_what_was_sent_before_the_client_closed_its_side_is_answered(served: Served) -> None:
    client = await served.negotiated()
    await client.send('{"execute": "hello"}' * 3 + '{"execute": "half')
    await client.stream.send_eof()
    assert [await client.line() for _ in range(4)] == [b'{"return": {}}\r\n'] * 3 + [b""]


async def test_a_command_that_waits_holds_up_only_its_own_client(served: Served, commands: Commands) -> None:
    patient, other = await served.negotiated(), await served.negotiated()
    await patient.send('{"execute": "wait", "id": 1}{"execute": "hello", "id": 2}')
    await commands.waiting.wait()
    assert await other.ask({"execute": "hello"}) == {"return": {}}
    commands.go.set()
    assert [(await patient.next())["id"] for _ in range(2)] == [1, 2]


async def test_a_command_that_has_begun_is_finished_without_its_client(
    served: Served, commands: Commands
) -> None:
    client = await served.negotiated()
    await client.send('{"execute": "wait"}{"execute": "hello"}')
    await commands.waiting.wait()
    await client.stream.aclose()
    commands.go.set()
    await served.until(lambda: served.server.clients == 0)
    assert commands.finished == ["wait"]


async def test_events_go_to_everybody_who_has_negotiated(served: Served) -> None:
    one, two, rude = await served.negotiated(), await served.negotiated(), await served.raw()
    assert "QMP" in await rude.next()
    served.server.emit("STOP")
    served.server.emit("MIGRATION", {"status": "active"})
    for client in (one, two):
        stop, migration = await client.next(), await client.next()
        assert stop.keys() == {"event", "timestamp"}
        assert stop["event"] == "STOP"
        assert stop["timestamp"].keys() == {"seconds", "microseconds"}
        assert 0 <= stop["timestamp"]["microseconds"] < 1_000_000
        assert (migration["event"], migration["data"]) == ("MIGRATION", {"status": "active"})
    assert (await rude.ask({"execute": "hello"}))["error"]["class"] == "CommandNotFound"


async def test_a_client_that_does_not_read_is_not_listened_to(served: Served, commands: Commands) -> None:
    """So a hundred thousand replies of 100 kB each are never made at once."""
    rude, other = await served.negotiated(), await served.negotiated()
    commands.table.add("count", None, count := Counter())
    await rude.send('{"execute": "big"}{"execute": "count"}' * 1000)
    while count.calls == 0:
        assert await other.ask({"execute": "hello"}) == {"return": {}}
    for _ in range(20):
        assert await other.ask({"execute": "hello"}) == {"return": {}}
    assert count.calls < 20  # what the socket and the outbox hold, in steps of 100 kB
    for _ in range(1000):
        assert len((await rude.next())["return"]) == 100
        assert await rude.next() == {"return": {}}
    assert count.calls == 1000


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, *_: object) -> None:
        self.calls += 1


async def test_events_for_a_client_that_does_not_read_are_bounded() -> None:
    outbox = Outbox()
    for _ in range(10_000):
        outbox.put_event(b"x" * 1000)
    outbox.put_reply(b"the reply")
    outbox.end()
    waiting = b"".join([chunk async for chunk in taken(outbox)])
    assert 1_000_000 < len(waiting) < 1_100_000
    assert waiting.endswith(b"the reply")
    assert outbox.dropped_events == 10_000 - len(waiting) // 1000


async def taken(outbox: Outbox) -> AsyncIterator[bytes]:
    while chunk := await outbox.take():
        yield chunk


@pytest.mark.parametrize("kind", ["replies", "events"])
async def test_a_client_that_never_reads_is_dropped_in_the_end(
    commands: Commands, nursery: trio.Nursery, kind: str
) -> None:
    server = QMPServer(commands.table, version="1", stall_limit=0.2)
    with trio.fail_after(PATIENCE):
        address = await nursery.start(server.serve, "tcp::0")
        served = Served(server, address)
        host, port = address.removeprefix("tcp:").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as rude:
            await rude.send_all(b'{"execute": "qmp_capabilities"}')
            await served.until(lambda: bool(server.clients))
            if kind == "replies":
                with suppress(trio.BrokenResourceError):
                    while True:
                        await rude.send_all(b'{"execute": "big"}' * 1000)
            else:
                while server.clients:
                    server.emit("STOP", {"for": "x" * 10_000})
                    await trio.lowlevel.checkpoint()
            await served.until(lambda: server.clients == 0)


async def test_a_reply_that_is_too_long_is_an_error(served: Served, commands: Commands) -> None:
    async def huge(*_: object) -> object:
        return "x" * (5 << 20)

    commands.table.add("huge", None, huge)
    client = await served.negotiated()
    assert await client.ask({"execute": "huge"}) == error("the reply has 5242896 bytes, and may have 4194304")


async def test_only_so_many_clients_may_come(served: Served) -> None:
    for _ in range(64):
        await served.negotiated()
    refused = await served.raw()
    assert await refused.next() == error("64 clients are connected already, and no more may be")
    assert await refused.line() == b""
    await served.clients[0].stream.aclose()
    await served.until(lambda: served.server.clients == 63)
    await served.negotiated()


async def test_what_was_answered_last_is_sent_when_the_server_is_cancelled(
    commands: Commands, nursery: trio.Nursery
) -> None:
    server = QMPServer(commands.table, version="1")
    scope = trio.CancelScope()

    async def quit_now(*_: object) -> None:
        server.emit("SHUTDOWN", {"guest": False})
        scope.cancel()

    async def serve(task_status: trio.TaskStatus[str]) -> None:
        with scope:
            await server.serve("tcp::0", task_status=task_status)

    commands.table.add("quit", None, quit_now)
    with trio.fail_after(PATIENCE):
        address = await nursery.start(serve)
        host, port = address.removeprefix("tcp:").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as client:
            await client.send_all(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
            text = b"".join([chunk async for chunk in client]).decode()
    *_, shutdown, last = text.splitlines()
    assert json.loads(shutdown)["event"] == "SHUTDOWN"
    assert json.loads(last) == {"return": {}}


async def test_everybody_is_let_in_only_with_a_warning(nursery: trio.Nursery) -> None:
    said: list[str] = []
    server = QMPServer(CommandTable(), version="1", notices=said.append)
    await nursery.start(server.serve, "tcp::0")
    assert said == []
    address = await nursery.start(server.serve, "tcp:0.0.0.0:0,insecure=on")
    assert said == [
        f"the monitor listens on {address}: anyone who reaches that port controls the machine, "
        "and may run programs with your rights"
    ]


@pytest.mark.parametrize(
    "request_",
    [
        '{"execute": "query-status", "execute": "quit"}',
        '{"execute": "echo", "arguments": {"text": "a", "text": "b"}}',
        '{"execute": "echo", "arguments": {"text": "a", "te\\u0078t": "b"}}',
        '{"execute": "echo", "id": {"a": [{"b": 1, "b": 1}]}}',
        '{"execute": "echo", "arguments": {"a": 1}, "arguments": {}}',
    ],
)
async def test_a_name_that_has_two_values_is_an_error(served: Served, request_: str) -> None:
    client = await served.negotiated()
    assert await client.ask(request_) == error("JSON parse error, duplicate key")
    assert "return" in await client.ask({"execute": "query-commands"})
