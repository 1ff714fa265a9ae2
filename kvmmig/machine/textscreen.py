"""The text screen of a PC, which guests from books write to, and which nobody sees here."""

from __future__ import annotations

from kvmmig.machine.memory import GuestMemory

_AT, _COLUMNS, _ROWS = 0xB8000, 80, 25
_FEWEST = 3  # letters: less than that is hardly a text


def text_screen(memory: GuestMemory) -> str:
    """A paragraph with what a guest has written to video memory, or nothing."""
    cells = memory.read(_AT, 2 * _COLUMNS * _ROWS)[::2]  # every other byte is a colour
    letters = sum(32 < cell < 127 for cell in cells)
    if letters < _FEWEST or letters < sum(cell not in (0, 32) for cell in cells):
        return ""
    text = bytes(cell if 32 <= cell < 127 else 32 for cell in cells).decode("ascii")
    rows = [text[start : start + _COLUMNS].rstrip() for start in range(0, len(text), _COLUMNS)]
    shown = "\n".join(f"  | {row}" for row in rows if row)
    return (
        "\nIt wrote to a PC's screen (at 0xb8000), which nobody sees here; what it prints with int 10h, or "
        f"to the serial port, is seen. It wrote:\n{shown}"
    )
