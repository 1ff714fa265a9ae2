"""A number from outside is taken with its exact meaning, or refused in one sentence; wherever it comes in."""

# ruff: noqa: PT017 -- to be refused in one sentence is one of two right answers

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kvmmig.cli.settings
from kvmmig import units
from kvmmig.cli.app import cli
from kvmmig.cli.setting_table import BY_ANY_NAME
from kvmmig.errors import BadConfig, BadURI, KvmmigError
from kvmmig.guests import find
from kvmmig.machine import MachineConfig
from kvmmig.migration.policy import Limits
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import QMPError
from kvmmig.transport import transport_for
from kvmmig.transport.toolkit import TokenBucket
from kvmmig.transport.uri import TransportURI
from tests.monitor.lab import Lab

BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
UNITS: dict[str, int | Fraction] = {
    **BINARY,
    **{unit.upper(): factor for unit, factor in BINARY.items()},
    **{f"{unit.upper()}iB": factor for unit, factor in BINARY.items()},
    "": 1,
    "%": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": 1,
    "min": 60,
    "h": 3600,
}
ODD = (
    *("", " ", "-1", "+1", "0", "-0", "0ms", "inf", "nan", "1e3", "1e400", "9" * 400, "9" * 5000, "1_0"),
    *(
        "٤",
        "²",
        "１",
        "1gb",
        "1Gb/s",
        "0.4ms",
        "0.5ms",
        "300",
        "1.",
        ".5",
        "1,5s",
        "0x10",
        "1 0",
        "\x1b[31m1",
    ),
    *("9007199254740993", "18446744073709551616", "1\0", "1\n2", "1ms\n", "1" + "0" * 60 + "us", "\ud800"),
    *("0." + "0" * 60 + "1s", "1/2", "8 EiB", "99999999TB", "true", "None", "%", "MiB", "/s", "1/s", "100%"),
)
numbers = st.from_regex(r"[0-9]{1,25}(\.[0-9]{1,12})?", fullmatch=True)
texts = st.one_of(
    st.sampled_from(ODD),
    st.builds("{}{}{}".format, numbers, st.sampled_from(["", " "]), st.sampled_from([*UNITS, "MB/s", "B/s"])),
    st.text(max_size=20),
    st.text("0123456789.eE+-_ kmgbKMGBis/%\x1b", max_size=12),
)
PARSERS: dict[str, tuple[Callable[[str], float], Callable[[Any], str] | None]] = {
    "size": (units.parse_size, units.write_size),
    "memory": (lambda text: units.parse_size(text, units.MEMORY), units.write_size),
    "rate": (units.parse_rate, units.write_rate),
    "duration": (units.parse_duration, None),
    "downtime": (
        lambda text: units.parse_milliseconds(text, units.DOWNTIME_LIMIT),
        lambda ms: units.write_duration(ms / 1000),
    ),
    "seconds": (lambda text: units.parse_duration(text, bare="s"), None),
    "count": (lambda text: units.parse_count(text, units.SEED), units.write_count),
    "percent": (units.parse_percent, lambda share: f"{share}%"),
}


def is_a_sentence(words: str) -> bool:
    return words.isprintable() and len(words) < 400 and "Traceback" not in words


def meaning(text: str, kind: str) -> Fraction:
    """What a person means who writes this, worked out in another way than in the product."""
    text = text.strip().removesuffix("/s").rstrip()
    digits = text.rstrip("".join(UNITS))
    unit = text[len(digits) :].strip()
    minute = unit == "m" and kind in ("duration", "downtime", "seconds")
    factor = Fraction(60 if minute else UNITS[unit]) * (1000 if kind == "downtime" else 1)
    return Fraction(digits.strip()) * factor


@pytest.mark.parametrize("kind", PARSERS)
@given(text=texts)
def test_a_text_is_taken_exactly_or_refused_in_one_sentence(kind: str, text: str) -> None:
    parse, write = PARSERS[kind]
    try:
        number = parse(text)
    except ValueError as error:
        assert is_a_sentence(str(error))
        return
    meant = meaning(text, kind)
    assert number == (meant if write is not None else float(meant))
    if write is not None:
        assert parse(write(number)) == number


@given(st.integers(0, 2**63 - 1), st.integers(1, 2**64 - 1), st.integers(0, 10**13))
def test_what_is_written_is_read_back(size: int, rate: int, microseconds: int) -> None:
    assert units.parse_size(units.write_size(size)) == size
    assert units.parse_rate(units.write_rate(rate)) == rate
    seconds = microseconds / 10**6
    assert units.parse_duration(units.write_duration(seconds)) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (units.parse_duration, "300", "'300' has no unit; write 300ms or 300s"),
        (units.parse_rate, "500", "'500' has no unit; write 500B/s or 500MB/s"),
        (units.parse_size, "1gb", "'1gb' is not a size; did you mean 1GiB?"),
        (PARSERS["downtime"][0], "0.4ms", "is not a whole number of milliseconds; write 0ms or 1ms"),
        (PARSERS["downtime"][0], "40min", "'40min' is out of range; use 0s to 2000s"),
        (PARSERS["memory"][0], "512", "did you mean 512MiB?); use 1MiB to 64GiB"),
        (units.parse_duration, "9" * 400, "'99999999999999999999999999999999'... is too long for a duration"),
    ],
)
def test_what_is_refused_is_told_with_what_would_be_right(
    read: Callable[[str], float], text: str, sentence: str
) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- its text is looked at
        read(text)
    assert sentence in str(refused.value)


COMMANDS = (
    *(["run", "hello", option] for option in ("--memory", "--cpus")),
    ["run", "hello", "--migrate-to", "tcp:127.0.0.1:1", "--after"],
    ["demo", "--memory"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@given(text=texts)
def test_a_command_line_with_any_number_makes_sense_or_says_why_not(command: list[str], text: str) -> None:
    name, *arguments = command
    try:
        cli.commands[name].make_context(name, [*arguments, text])
    except click.UsageError as error:
        assert error.exit_code == 2
        assert "Traceback" not in error.format_message()


@pytest.mark.parametrize("setting", sorted(BY_ANY_NAME))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_a_setting_is_taken_or_is_a_wrong_command_line(
    setting: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvmmig.cli.settings, "run_to_end", lambda execute: 0)
    done = CliRunner().invoke(cli, ["set", "a", setting, text], standalone_mode=True)
    assert done.exit_code in (0, 2), done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("setting", "text", "sentence"),
    [
        ("downtime-limit", "300", "write 300ms or 300s"),
        ("downtime-limit", "0.4ms", "write 0ms or 1ms"),
        ("timeout", "0.5ms", "write 1ms; none is no limit"),
        ("timeout", "0", "none is no limit"),
        ("bandwidth", "0", "none is no limit"),
        ("throttle-max", "100%", "use 1% to 99%"),
    ],
)
def test_a_setting_is_never_rounded_to_another_meaning(setting: str, text: str, sentence: str) -> None:
    done = CliRunner().invoke(cli, ["set", "a", setting, text])
    assert done.exit_code == 2
    assert f"{setting}: " in done.output
    assert sentence in done.output


URIS = (
    *(("throttle+tcp", f"throttle.{name}") for name in ("rate", "latency", "jitter")),
    *(("fault+tcp", f"fault.{name}") for name in ("at", "seed", "for")),
)


@pytest.mark.parametrize(("scheme", "option"), URIS)
@given(text=texts)
def test_an_option_is_taken_or_is_a_wrong_uri(scheme: str, option: str, text: str) -> None:
    *wrappers, last = scheme.split("+")
    more = {"fault.what": "stall"} if wrappers == ["fault"] else {}
    uri = TransportURI(last, "127.0.0.1:1", {option: text, **more}, tuple(wrappers))
    try:
        transport_for(uri)
    except BadURI as error:
        assert str(error).isprintable()


@given(st.one_of(texts, st.integers(-5, 10**6).map(str)))
@example("65536")
@example("٤٤٤٤")
def test_a_port_is_one_or_the_uri_is_wrong(text: str) -> None:
    try:
        transport_for(TransportURI("tcp", f"127.0.0.1:{text}"))
    except BadURI as error:
        assert str(error).isprintable()
    else:
        assert text.isascii()
        assert int(text) in range(65536)


PARAMETERS = {
    "max-bandwidth": (0, 2**64 - 1),
    "downtime-limit": (0, 2_000_000),
    "cpu-throttle-initial": (1, 99),
    "cpu-throttle-increment": (1, 99),
    "max-cpu-throttle": (1, 99),
    "x-kvmmig-timeout": (0, 365 * 86_400_000),
    "x-kvmmig-stall-timeout": (1, 365 * 86_400_000),
}
json_numbers = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(
        ["1.0", "1.5", "1e3", "1e400", "-1e400", "1E-400", "9" * 400, "9" * 5000, "-0", '"1"', "true"]
    ),
)


@pytest.mark.parametrize("parameter", PARAMETERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_monitor_takes_a_number_in_its_range_and_no_other(parameter: str, data: st.DataObject) -> None:
    least, most = PARAMETERS[parameter]
    near = st.sampled_from([least - 1, least, most, most + 1]).map(str)
    text = data.draw(st.one_of(near, json_numbers))

    async def main() -> None:
        async with MachineControl.open(name="a") as control:
            lab = Lab(control)
            arguments = f'{{"{parameter}": {text}}}'.encode()
            try:
                await lab.table.execute(lab.session, "migrate-set-parameters", arguments)
            except QMPError as error:
                assert is_a_sentence(str(error))
                assert parameter in str(error).replace("_", "-"), "QEMU has both spellings"
            else:
                assert least <= int(text) <= most
                assert (await lab("query-migrate-parameters"))[parameter] == int(text)

    trio.run(main)


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        (
            "migrate-set-parameters",
            b'{"max-bandwidth": 1' + b"0" * 400 + b"}",
            "'max-bandwidth' expects uint64",
        ),
        ("migrate-set-parameters", b'{"max-bandwidth": 1e400}', "'max-bandwidth' expects uint64"),
        ("migrate-set-parameters", b'{"downtime-limit": -1}', "range of 0 to (2000 * 1000) ms"),
        ("migrate-set-parameters", b'{"downtime-limit": 1.0}', "'downtime-limit' expects uint64"),
        ("migrate-set-parameters", b'{"x-kvmmig-stall-timeout": 0}', "in the range of 1 to 31536000000 ms"),
        ("x-kvmmig-query-page-map", b'{"blocks": 65537}', "an integer in the range of 1 to 65536"),
        ("x-kvmmig-set-policy", b'{"policy": "max-rounds", "parameters": {"rounds": 2.5}}', "a whole number"),
        ("x-kvmmig-set-policy", b'{"policy": "max-rounds", "parameters": {"rounds": 1e300}}', "1 to 1000000"),
        ("x-kvmmig-set-policy", b'{"policy": "max-rounds", "parameters": {"rounds": 1e400}}', "out of range"),
        ("x-kvmmig-set-policy", b'{"policy": "no-progress", "parameters": {"shrink": 0}}', "use 0.001 to 1"),
    ],
)
async def test_a_monitor_says_a_range_in_qemus_words(command: str, arguments: bytes, sentence: str) -> None:
    async with MachineControl.open(name="a") as control:
        lab = Lab(control)
        with pytest.raises(QMPError) as refused:
            await lab.table.execute(lab.session, command, arguments)
        assert sentence in str(refused.value)


WRONG: dict[str, Any] = {
    **{
        repr(wrong): wrong for wrong in (-1, 0, math.nan, math.inf, -math.inf, 1e-300, True, "4x", None, b"4")
    },
    "huge": 10**5000,
    "far below 0": -(10**5000),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_program_that_gives_a_wrong_number_hears_a_sentence(which: str) -> None:
    wrong = WRONG[which]
    refused: list[Exception] = []
    for make in (
        lambda: MachineConfig(memory=wrong),
        lambda: MachineConfig(memory=1 << 20, cpus=wrong),
        lambda: find("dirtier").program(memory=1 << 24, cpus=1, settings={"hot": wrong}),
        lambda: Limits(stall_timeout=wrong),
        lambda: Limits(step=wrong),
        lambda: TokenBucket(wrong),
    ):
        try:
            make()
        except (ValueError, KvmmigError) as error:
            assert is_a_sentence(str(error))
            refused.append(error)
    assert len(refused) >= 2
    assert isinstance(refused[0], BadConfig)


def test_any_number_can_be_shown() -> None:
    for show in (units.format_size, units.format_rate, units.format_duration, units.write_count):
        for number in (10**5000, -(10**5000), math.inf, -math.inf, math.nan, 0, -1, 1e308):
            assert is_a_sentence(show(number))


@pytest.mark.parametrize(
    ("show", "number", "text"),
    [
        (units.format_size, 1 << 30, "1 GiB"),
        (units.format_size, 554_696_704, "529 MiB"),
        (units.format_size, 74_239_181, "70.8 MiB"),
        (units.format_size, (1 << 30) - 4096, "1.00 GiB"),
        (units.format_rate, 999_600_000, "1.00 GB/s"),
        (units.format_rate, 740e6, "740 MB/s"),
        (units.format_duration, 0, "0 s"),
        (units.format_duration, 0.0123, "12.3 ms"),
        (units.format_duration, 0.05, "50 ms"),
        (units.format_duration, 0.9999, "1.00 s"),
        (units.format_duration, 59.96, "1 min"),
        (units.format_duration, 125, "2 min 5 s"),
        (units.format_duration, 3725, "1 h 2 min"),
        (units.format_duration, 90_000, "1 d 1 h"),
    ],
)
def test_a_measurement_has_three_digits_and_a_whole_number_none_behind_the_point(
    show: Callable[[float], str], number: float, text: str
) -> None:
    assert show(number) == text
