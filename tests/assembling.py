"""Guests that a test writes itself. Where there is no nasm to assemble them, the test is skipped."""

from __future__ import annotations

import shutil
from functools import cache
from typing import Literal

import pytest

from kvmmig.guests import assemble


def need_nasm() -> None:
    """Skip the test where nasm is not installed."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not installed")


@cache
def assembled(source: str, *, bits: Literal[16, 32, 64], origin: int) -> bytes:
    """The machine code of a short source, in which ``;`` separates instructions, and so begins no comment."""
    need_nasm()
    return assemble(source.replace(";", "\n"), name="a test's guest", bits=bits, origin=origin)
