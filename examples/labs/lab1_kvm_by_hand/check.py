"""What is still wrong in lab 1, and why."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

NEEDS_KVM = True

_PORT = b"\xba\xf8\x03"  # mov dx, 0x3f8
_OUT, _IN, _HLT = b"\xee", b"\xec", b"\xf4"


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    output, exits = student.run_guest(_HLT)
    if exits != {"Hlt": 1}:
        yield (
            f"a guest that only halts has one exit, Hlt, and you have counted {exits or 'none'}: is it in "
            "its memory, does it begin there (cs is 0, rip is ADDRESS, rflags is 2), is the Hlt counted too?"
        )
        return
    if output:
        yield f"a guest that only halts has no output, and yours is {output!r}"
    code = _PORT + b"\xb0A" + _OUT + b"\xb0B" + _OUT + _HLT
    output, exits = student.run_guest(code)
    if output != b"AB":
        yield f"a guest that writes A and B to port 0x3f8 has the output b'AB', and yours is {output!r}"
    if exits != {"IoOut": 2, "Hlt": 1}:
        yield f"its exits are 2 IoOut and 1 Hlt, and you have counted {exits}"
    elsewhere = b"\xb0X\xe6\x80" + _HLT  # out 0x80, al
    if b"X" in student.run_guest(elsewhere)[0]:
        yield "what a guest writes to port 0x80 is no output: only port 0x3f8 is"
    echo = _PORT + (_IN + _OUT) * 3 + _HLT
    output, exits = student.run_guest(echo, b"hi")
    if output != b"hi\0":
        yield (
            "a guest that reads three times and writes what it has read, with b'hi' typed, says b'hi\\x00', "
            f"and yours says {output!r}: is complete_in called for every IoIn, with the next byte?"
        )
