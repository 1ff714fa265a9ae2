"""Small guests, assembled for the tests, and the place where they leave what they have to say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from kvmmig.machine import Entry, Program
from tests.assembling import assembled

Assemble = Callable[[str], Program]
WaitUntil = Callable[[Callable[[], object]], Awaitable[None]]


#: The beginning of a real-mode guest that the serial port interrupts when a byte was typed, at 0x7d00.
SERIAL_INTERRUPTS = """
    cli
    xor ax, ax
    mov ds, ax
    mov word [0x90], 0x7d00
    mov word [0x92], 0
    mov al, 0x11
    out 0x20, al
    mov al, 0x20
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0xef
    out 0x21, al
    mov dx, 0x3f9
    mov al, 1
    out dx, al
"""


@pytest.fixture
def long64() -> Assemble:
    """Assemble a guest for 64-bit mode."""
    return lambda source: Program("test", Entry.LONG64, assembled(source, bits=64, origin=0x100000))


@pytest.fixture
def real16() -> Assemble:
    """Assemble a guest for real mode."""
    return lambda source: Program("test", Entry.REAL16, assembled(source, bits=16, origin=0x7C00))


@pytest.fixture
def counter(long64: Assemble) -> Program:
    """Writes 0, 1, 2, ... (bytes) to the debug console for ever."""
    return long64("xor eax, eax; again: out 0xe9, al; inc al; jmp again")


@pytest.fixture
def spinner(long64: Assemble) -> Program:
    """Increments the quadword at 2 MiB for ever, and never leaves the guest."""
    return long64("mov rbx, 0x200000; again: inc qword [rbx]; jmp again")


@pytest.fixture
def quitter(long64: Assemble) -> Program:
    """Ends at once with status 42."""
    return long64("mov al, 42; out 0xf4, al; again: jmp again")


@pytest.fixture
def wait_until() -> WaitUntil:
    """Wait for something that a guest does and that tells nobody: a byte in its memory, its output so far."""

    async def wait(condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110 -- there is no event, and spinning would keep the vCPU from the GIL
            await trio.sleep(0.001)

    return wait
