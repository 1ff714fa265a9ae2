"""From what is typed after ``kvmmig run`` to a program: as Python users have it, see there."""

from __future__ import annotations

from kvmmig.guests.programs import find_program as find_program
