"""What only a shell command can get wrong: its words, its status, and what it starts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadURI, ChannelBroken
from kvmmig.transport import Transport, TransportURI
from tests.transports.saver import other_saver
from tests.transports.using import read_all, send_all

Make = Callable[[str | TransportURI], Transport]

_DATA = bytes(range(256)) * 40_000


async def _save(transport: Transport, data: bytes) -> None:
    with trio.fail_after(60):
        async with transport.connect() as channel:
            await send_all(channel, data)


def test_no_command_is_refused(transport: Make) -> None:
    with pytest.raises(BadURI, match=r"names no command: write exec:COMMAND"):
        transport("exec: ")


def test_only_a_command_that_is_said_to_store_stores(transport: Make) -> None:
    assert [transport(f"exec:true{live}").stores for live in ("", "?live=on", "?live=off")] == [
        False,
        False,
        True,
    ]


async def test_a_shell_does_what_is_asked(transport: Make, tmp_path: Path) -> None:
    await _save(transport(f"exec:gzip -1 > {tmp_path}/a.gz && mv {tmp_path}/a.gz {tmp_path}/b.gz"), _DATA)
    assert os.listdir(tmp_path) == ["b.gz"]
    assert await read_all(transport(f"exec:gzip -dc {tmp_path}/b.gz | cat")) == _DATA


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("cat >/dev/null; echo disk on fire >&2; exit 3", "ended with status 3; it said: disk on fire"),
        ("exit 4", "ended with status 4"),
        ("kill -TERM $$", "was killed by SIGTERM"),
        ("head -c 1000", "ended before it had taken everything"),
        ("cat > /no/such/file", "ended with status 2; it said: .*cannot create /no/such/file"),
        ("exec <&-; exec sleep 1000", "closed its pipe but lives on"),
    ],
)
async def test_a_command_that_fails_says_how(command: str, sentence: str, transport: Make) -> None:
    with pytest.raises(ChannelBroken, match=f"the command '{command[:5]}.*{sentence}"):
        await _save(transport(f"exec:{command}"), _DATA)


async def test_a_command_that_takes_nothing_and_is_content_has_not_saved_it(transport: Make) -> None:
    """Little enough that all of it fits into the pipe."""
    with pytest.raises(ChannelBroken, match="ended before it had taken everything"):
        await _save(transport("exec:sleep 0.3"), b"a guest")


async def test_it_is_done_only_when_the_command_is(transport: Make, tmp_path: Path) -> None:
    await _save(transport(f"exec:cat >/dev/null; sleep 0.2; touch {tmp_path}/done"), b"a guest")
    assert (tmp_path / "done").exists()


async def test_a_reading_command_that_fails_is_no_end_of_the_stream(transport: Make) -> None:
    with pytest.raises(ChannelBroken, match="ended with status 5; it said: half of it"):
        await read_all(transport("exec:echo data; echo half of it >&2; exit 5"))


async def test_only_the_last_words_of_many_are_told(transport: Make) -> None:
    with pytest.raises(ChannelBroken, match=r"it said: .* 99999 100000$") as caught:
        await _save(transport("exec:seq 100000 >&2; exit 1"), _DATA)
    assert len(str(caught.value)) < 700


async def test_an_abort_kills_all_that_the_command_has_started(transport: Make, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = f"(trap '' TERM; echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 1000) | sleep 1000"
    async with transport(f"exec:{command}").connect() as channel:
        with trio.fail_after(60):
            while not pid.exists():  # noqa: ASYNC110 - a shell tells nobody
                await trio.sleep(0.01)
            channel.abort()
            while _of_group(int(pid.read_text())):  # noqa: ASYNC110 - nor does its end
                await trio.sleep(0.01)


@pytest.mark.parametrize("command", ["cat > {0}/new", "(cat > {0}/new)", "cat | cat > {0}/new"])
@pytest.mark.parametrize("live", ["", "?live=off"])
def test_a_command_is_killed_before_it_sees_the_end_of_a_killed_saver(
    command: str, live: str, tmp_path: Path
) -> None:
    stopped = f"echo $$ > {tmp_path}/group; {command.format(tmp_path)} && mv {tmp_path}/new {tmp_path}/whole"
    with other_saver(f"exec:{stopped}{live}") as saver:
        group = int((tmp_path / "group").read_text())
        saver.send_signal(signal.SIGKILL)
        saver.wait()
    deadline = time.monotonic() + 20
    while _of_group(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not (tmp_path / "whole").exists()


def test_a_command_that_goes_on_with_the_guest_is_left_to_judge_it_by_itself(tmp_path: Path) -> None:
    with other_saver(f"exec:cat >/dev/null; touch {tmp_path}/went-on?live=on") as saver:
        saver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not (tmp_path / "went-on").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _of_group(group: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found
