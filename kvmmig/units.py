"""Quantities as people write them, ``1GiB``, ``50ms``, ``1.5GB/s``; the ranges of all numbers from outside.

A number that a person, a program, a URI, a monitor's client or the other side gives is read here, exactly,
and held against its `Range`, which stands here too. What can't be taken is a `ValueError` whose text is a
sentence: the number as it was given, what is wrong with it, and what would be right.

Our own, because what PyPI has either parses only one of the two families, prints only, or costs more to
import than the rest of the command line together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z%]*)\s*", re.ASCII)
_LONGEST = 64  # characters of a number; a longer one is a slip, or an attack on whoever multiplies it
_SHOWN = 32  # characters of what was given, in an error
_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LETTERS = {letter: 1 << 10 * (1 + "KMGT".index(letter.upper())) for letter in "KkMmGgTt"}
_SIZES = {"B": 1, **_LETTERS, **_DECIMAL, **_BINARY}
_SECONDS = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "us": Fraction(1, 10**6),
    "min": Fraction(60),
    "m": Fraction(60),
    "h": Fraction(3600),
}
_MILLISECOND = _SECONDS["ms"]


def write_size(count: float) -> str:
    """Exactly, and as `parse_size` reads it: ``64MiB``, ``1500B``."""
    for unit, factor in reversed(_BINARY.items()):
        if count and count % factor == 0:
            return f"{write_count(count // factor)}{unit}"
    return f"{write_count(count)}B"


def write_rate(per_second: float) -> str:
    """Exactly, and as `parse_rate` reads it: ``500MB/s``, ``1B/s``."""
    for unit in ("TB", "GB", "MB", "kB"):
        if per_second and per_second % _DECIMAL[unit] == 0:
            return f"{write_count(per_second // _DECIMAL[unit])}{unit}/s"
    return f"{write_count(per_second)}B/s"


def write_duration(seconds: float) -> str:
    """As `parse_duration` reads it, and exactly where it is a whole number of microseconds: ``50ms``."""
    if not math.isfinite(seconds):
        return f"{seconds:g} s"
    exact = Fraction(seconds).limit_denominator(10**6)
    for unit in ("h", "min", "s", "ms"):
        if exact and exact % _SECONDS[unit] == 0:
            return f"{exact // _SECONDS[unit]}{unit}"
    return f"{round(exact * 10**6)}us" if exact else "0s"


def write_count(number: float) -> str:
    """A bare number, as a person reads it: no number that a program gives makes this long or fail."""
    if isinstance(number, int) and abs(number) >= 10**_SHOWN:
        return f"{'-' if number < 0 else ''}(a number of {number.bit_length()} bits)"
    return str(int(number)) if math.isfinite(number) and number == int(number) else f"{number:g}"


def _write_percent(number: float) -> str:
    return f"{write_count(number)}%"


def _write_milliseconds(number: float) -> str:
    return write_duration(number / 1000)


@dataclass(frozen=True, slots=True)
class Range:
    """What a number from outside may be: ``least`` to ``most``, both included.

    ``write`` writes one as it is to be given. ``unit`` is a monitor's name of the unit, which has no other.
    """

    least: float
    most: float
    write: Callable[[float], str] = write_count
    unit: str = ""

    def __contains__(self, number: float | Fraction) -> bool:
        return self.least <= number <= self.most  # never true of nan

    def __str__(self) -> str:
        return f"{self.write(self.least)} to {self.write(self.most)}"

    @property
    def in_words(self) -> str:
        """As QEMU says it: ``an integer in the range of 0 to 2000000 ms``."""
        ends = f"{write_count(self.least)} to {write_count(self.most)}"
        return f"an integer in the range of {ends}{self.unit and ' '}{self.unit}"

    def check(self, number: object, what: str) -> float:
        """A number that a program gave as ``what``. Raises `ValueError`; so it does for what is no number."""
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{what} must be a number, not {_shortened(ascii(number))}")
        if number not in self:
            raise ValueError(f"{what} can't be {_written(number, self.write)}; use {self}")
        return number

    def check_whole(self, number: object, what: str) -> int:
        """As `check`, for what only an ``int`` can be."""
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{what} must be a whole number, not {_shortened(ascii(number))}")
        self.check(number, what)
        return number


def _written(number: float, write: Callable[[float], str]) -> str:
    readable = math.isfinite(number) if isinstance(number, float) else abs(number) < 10**_SHOWN
    return write(number) if readable else write_count(number)


_INT64 = (1 << 63) - 1
_YEAR = 365 * 24 * 3600

#: Any number of a monitor's that is not negative.
UNSIGNED = Range(0, (1 << 64) - 1)
#: Any number of bytes.
SIZE = Range(0, _INT64, write_size)
#: A machine's memory: so much, and a multiple of that, as `kvmmig.machine.memory` wants it.
MEMORY = Range(1 << 20, 64 << 30, write_size)
MEMORY_UNIT = 256 << 10
#: A machine's vCPUs.
CPUS = Range(1, 16)
#: A toy guest's parameter: the assembler's numbers are signed.
PARAMETER = Range(0, _INT64)
#: Bytes a second. QEMU's ``max-bandwidth`` goes as far; 0 is "no limit" there.
RATE = Range(1, (1 << 64) - 1, write_rate)
MAX_BANDWIDTH = Range(0, RATE.most, write_rate, "bytes/second")
#: Any duration, in seconds.
DURATION = Range(0, _YEAR, write_duration)
#: Milliseconds that the guest may stand still, as QEMU takes them.
DOWNTIME_LIMIT = Range(0, 2_000_000, _write_milliseconds, "ms")
#: Milliseconds of a whole migration; 0 is "no limit" in a monitor.
TIMEOUT = Range(1, _YEAR * 1000, _write_milliseconds, "ms")
NO_TIMEOUT_OR = Range(0, TIMEOUT.most, _write_milliseconds, "ms")
#: Milliseconds without one byte accepted.
STALL_TIMEOUT = Range(1, _YEAR * 1000, _write_milliseconds, "ms")
#: Milliseconds for the first words of the other side.
SETUP_TIMEOUT = Range(1, _YEAR * 1000, _write_milliseconds, "ms")
#: Seconds of a bound that a program sets; a step is short, or it bounds nothing.
BOUND = Range(1e-6, _YEAR, write_duration)
STEP = Range(1e-6, 60, write_duration)
#: Per cent of the time.
PERCENT = Range(1, 99, _write_percent)
#: The same as a share, of a policy.
SHARE = Range(0, 0.99)
#: Rounds of a migration.
ROUNDS = Range(1, 1_000_000)
#: What a round must leave less than, as a share of the best one.
SHRINK = Range(0.001, 1)
#: Blocks that a page map is shown in.
MAP_BLOCKS = Range(1, 65536)
#: QEMU's ``calc-time``, in milliseconds.
CALC_TIME = Range(50, 60_000, _write_milliseconds, "ms")
#: QEMU's ``sample-pages``: of each GiB.
SAMPLE_PAGES = Range(128, 16_384)
PORT = Range(0, 65535)
#: A user of this host; the last number means none, to the kernel.
UID = Range(0, (1 << 32) - 2)
#: What random choices begin with.
SEED = Range(0, _INT64)
#: Columns and lines that the environment claims for a terminal.
TERMINAL = Range(1, 10_000)


def parse_size(text: str, within: Range = SIZE) -> int:
    """Bytes in ``text``: ``4096``, ``64KiB``, ``1GiB``, ``1G`` (binary), ``500MB`` (decimal).

    Raises `ValueError` with a sentence that says what would be right.
    """
    how = "write it like 64MiB, 1GiB or 4096"
    number, unit = _split(text, "size", how)
    size = number * _factor(text, number, unit or "B", _SIZES, "size", how)
    if size.denominator != 1:
        raise ValueError(f"{_quoted(text)} is not a whole number of bytes; {how}")
    meant = ""
    if not unit and size < within.least and size * (1 << 20) in within:
        meant = f" (it is in bytes; did you mean {size}MiB?)"
    return int(_within(text, size, within, meant))


def parse_rate(text: str, within: Range = RATE) -> int:
    """Bytes a second in ``text``: ``500MB/s``, ``500MB``. Raises `ValueError` as `parse_size` does."""
    how = "write it like 500MB/s"
    number, unit = _split(text.rstrip().removesuffix("/s"), "rate", how, text)
    if not number:
        raise ValueError("a rate of 0 would never end; write it like 50MB/s")
    if not unit:
        bare = _shortest(number)
        raise ValueError(f"{_quoted(text)} has no unit; write {bare}B/s or {bare}MB/s")
    rate = number * _factor(text, number, unit, _SIZES, "rate", how, "/s")
    if rate.denominator != 1:
        raise ValueError(f"{_quoted(text)} is not a whole number of bytes a second; {how}")
    return int(_within(text, rate, within))


def parse_duration(text: str, within: Range = DURATION, *, bare: str = "") -> float:
    """Seconds in ``text``: ``1.5s``, ``50ms``, ``2min``. Raises `ValueError` as `parse_size` does.

    A number without a unit is refused, except for 0, and where ``bare`` says what it is: the name of the
    place where it is given must have told the unit then.
    """
    return float(_within(text, _duration(text, bare), within))


def parse_milliseconds(text: str, within: Range) -> int:
    """Milliseconds in a duration. Raises `ValueError` for one that is no whole number of them, too."""
    milliseconds = _duration(text, "") / _MILLISECOND
    if milliseconds.denominator != 1:
        near = [n for n in (math.floor(milliseconds), math.ceil(milliseconds)) if n in within]
        right = f"write {' or '.join(f'{n}ms' for n in near)}" if near else f"use {within}"
        raise ValueError(f"{_quoted(text)} is not a whole number of milliseconds; {right}")
    return int(_within(text, milliseconds, within))


def parse_percent(text: str, within: Range = PERCENT) -> int:
    """Per cent in ``text``: ``20%``, ``20``. Raises `ValueError` as `parse_size` does."""
    how = "write it like 20%"
    number, unit = _split(text, "share", how)
    if unit not in ("", "%"):
        raise ValueError(f"{_quoted(text)} is not a share; {how}")
    if number.denominator != 1:
        raise ValueError(f"{_quoted(text)} is not a whole number of per cent; {how}")
    return int(_within(text, number, within))


def parse_count(text: str, within: Range) -> int:
    """A whole number without a unit, in ASCII digits. Raises `ValueError` as `parse_size` does."""
    how = f"use {within}"
    number, unit = _split(text, "number", how)
    if unit or number.denominator != 1:
        raise ValueError(f"{_quoted(text)} is not a whole number; {how}")
    return int(_within(text, number, within))


def parse_bandwidth(bandwidth: float | str | None) -> float | None:
    """Bytes a second, of a number or of text as `parse_rate` reads it; None is no limit.

    `ValueError` for what is no rate.
    """
    if bandwidth is None:
        return None
    if isinstance(bandwidth, str):
        return parse_rate(bandwidth)
    if bandwidth == 0:
        raise ValueError("a bandwidth of 0 would never end it; leave it out for no limit")
    return RATE.check(bandwidth, "a bandwidth")


def _split(text: str, kind: str, how: str, given: str | None = None) -> tuple[Fraction, str]:
    """The number in ``text`` and its unit. ``given`` is what errors quote."""
    given = text if given is None else given
    if len(text) > _LONGEST:
        raise ValueError(f"{_quoted(given)} is too long for a {kind}; {how}")
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{_quoted(given)} is not a {kind}; {how}")
    return Fraction(match[1]), match[2]


def _factor(
    text: str,
    number: Fraction,
    unit: str,
    factors: Mapping[str, int | Fraction],
    kind: str,
    how: str,
    end: str = "",
) -> int | Fraction:
    if unit in factors:
        return factors[unit]
    near = unit.lower()
    meant = [name for name in factors if name.lower() in (near, near.removesuffix("b") + "ib")]
    if (near.endswith("b") and len(near) > 1) or near in ("s", "ms", "us", "min", "h"):
        bare = _shortest(number)
        names = [
            f"{bare}{name}{end}" for name in sorted(meant, key=lambda name: "i" not in name) if name != "KB"
        ]
        # Memory is binary, and so are sizes; what is sold by links and disks is not.
        names = names[:1] if factors is _SIZES and not end else names
        if names:
            raise ValueError(f"{_quoted(text)} is not a {kind}; did you mean {' or '.join(names)}?")
    raise ValueError(f"{_quoted(text)} is not a {kind}; {how}")


def _duration(text: str, bare: str) -> Fraction:
    how = "write it like 2s or 50ms"
    number, unit = _split(text, "duration", how)
    if not number and not unit:
        return number
    if not unit and not bare:
        shown = _shortest(number)
        raise ValueError(f"{_quoted(text)} has no unit; write {shown}ms or {shown}s")
    return number * _factor(text, number, unit or bare, _SECONDS, "duration", how)


def _within(text: str, number: Fraction, within: Range, meant: str = "") -> Fraction:
    if number not in within:
        raise ValueError(f"{_quoted(text)} is out of range{meant}; use {within}")
    return number


def _shortest(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"{float(number):g}"


def _quoted(text: str) -> str:
    """What was given, in quotes, with nothing in it that a terminal would obey, and not too long."""
    return ascii(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}..."


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def format_size(count: float) -> str:
    """``1073741824`` -> ``1 GiB``; memory and stream sizes are binary, as KVM's pages are."""
    return _measured(_finite(count), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_rate(per_second: float) -> str:
    """Bytes a second, decimal, as links and disks are sold: ``4.21 GB/s``."""
    return _measured(_finite(per_second), 1000, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"))


def format_duration(seconds: float) -> str:
    """``0.01234`` -> ``12.3 ms``; from a minute on in two units, and whole: ``2 min 5 s``."""
    seconds = _finite(seconds)
    if not seconds:
        return "0 s"
    if not abs(seconds) < _AGES:
        return f"{seconds:g} s"
    if abs(seconds) < 1:
        return _measured(seconds * 1e6, 1000, ("us", "ms", "s"))
    if abs(seconds) < 59.95:
        return f"{_three_digits(seconds)} s"
    whole = abs(round(seconds))
    unit, size, part, part_size = next(each for each in _LONG if whole >= each[1])
    more = whole % size // part_size
    return f"{'-' * (seconds < 0)}{whole // size} {unit}" + (f" {more} {part}" if more else "")


_LONG = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
_AGES = 1e12  # seconds


def _measured(number: float, step: int, units: tuple[str, ...]) -> str:
    # What would be rounded up to a whole next unit is given in that one: three digits are enough then.
    most = step - 0.5
    *smaller, largest = units
    for unit in smaller:
        if abs(number) < most:
            return f"{_three_digits(number)} {unit}"
        number /= step
    return f"{_three_digits(number)} {largest}"


def _three_digits(number: float) -> str:
    """Three digits, which is what a measurement has; a whole number, such as what was asked for, bare."""
    size = abs(number)
    if not size < 99.95 or math.isclose(number, round(number), rel_tol=1e-9):
        return f"{number:.3g}" if size >= 1e15 else f"{number:.0f}"
    return f"{number:.1f}" if size >= 9.995 else f"{number:.2f}"


def _finite(number: float) -> float:
    """As a float: an int that somebody else's program sent may be too large to be one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
