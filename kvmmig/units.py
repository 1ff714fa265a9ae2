"""Quantities the way people write them: ``1GiB``, ``64MiB``, ``500MB``, ``50ms``, ``1.5GB/s``.

Our own, because what PyPI has either parses only one of the two families, prints only, or costs more to
import than the rest of the command line together.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DECIMAL = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SHORT = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZES = {name.lower(): factor for name, factor in (_DECIMAL | _BINARY | _SHORT).items()}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes in ``text``: ``4096``, ``64KiB``, ``1GiB``, ``1G`` (binary), ``500MB`` (decimal).

    Raises `ValueError` with a sentence that says what would be right.
    """
    match = _NUMBER.fullmatch(text)
    factor = _SIZES.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write it like 64MiB, 1GiB or 4096")
    size = float(match[1]) * factor
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes; write it like 64MiB, 1GiB or 4096")
    return int(size)


def parse_duration(text: str) -> float:
    """Seconds in ``text``: ``2``, ``1.5s``, ``50ms``, ``2min``. Raises `ValueError` as `parse_size` does."""
    match = _NUMBER.fullmatch(text)
    factor = _SECONDS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a duration; write it like 2s, 50ms or 1.5")
    return float(match[1]) * factor


def parse_rate(text: str) -> int:
    """Bytes a second in ``text``: ``500MB/s``, ``500MB``. Raises `ValueError` as `parse_size` does."""
    try:
        return parse_size(text.strip().removesuffix("/s"))
    except ValueError:
        raise ValueError(f"{text!r} is not a rate; write it like 500MB/s") from None


def parse_bandwidth(bandwidth: float | str | None) -> float | None:
    """Bytes a second, of a number or of text as `parse_rate` reads it; None is no limit.

    `ValueError` unless it is positive.
    """
    rate = parse_rate(bandwidth) if isinstance(bandwidth, str) else bandwidth
    if rate is not None and not rate > 0:
        raise ValueError(f"a bandwidth of {bandwidth} would never end it; leave it out for no limit")
    return rate


def format_size(count: float) -> str:
    """``1073741824`` -> ``1.0 GiB``; memory and stream sizes are binary, as KVM's pages are."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_rate(per_second: float) -> str:
    """Bytes a second, decimal, as links and disks are sold: ``4.2 GB/s``."""
    for unit in ("B/s", "kB/s", "MB/s"):
        if abs(per_second) < 1000:
            return f"{per_second:.0f} {unit}"
        per_second /= 1000
    return f"{per_second:.2f} GB/s"


def format_duration(seconds: float) -> str:
    """``0.0123`` -> ``12.3 ms``; three digits are enough for a person."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"
