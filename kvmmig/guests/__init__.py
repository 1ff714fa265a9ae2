"""Toy guests, each one assembler file that can be read, copied and changed."""

from __future__ import annotations

from kvmmig.guests.assembler import assemble
from kvmmig.guests.check import Check
from kvmmig.guests.toy import Parameter, ToyGuest, available, check, check_machine, find

__all__ = ["Check", "Parameter", "ToyGuest", "assemble", "available", "check", "check_machine", "find"]
