"""How fast ``tls+`` is, beside what one core can encrypt: ``make tls``. In one run, in turns; medians.

``openssl speed`` says how many bytes a second one core encrypts with the cipher that the two sides have agreed
upon. What kvmmig does is measured in three ways, each in turns with it:

- *encrypts*: this process sends through ``tls+tcp:`` to one that throws the encrypted bytes away, so only one
  side's cipher runs, as where the two sides are two hosts;
- *both sides*: to another process on this host that decrypts, so the ciphers, the copies and both ends of the
  TCP connection share this host's cores;
- *plain*: the same bytes through ``tcp:`` alone.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import trio
import trustme
from rich.console import Console

from kvmmig.transport import Channel, SendChannel, TransportURI, transport_for
from kvmmig.units import format_rate

MIB = 1 << 20
GOAL = 0.6  # of what one core encrypts

_CIPHERS = {"TLS_AES_256_GCM_SHA384": "aes-256-gcm", "TLS_AES_128_GCM_SHA256": "aes-128-gcm"}
_RECORD = 16384  # bytes, as TLS has them

# Hands each connection's bytes to nobody: of the first argument's URI, or encrypted by a relay that only reads.
_RECEIVER = """
import sys, trio
from kvmmig.transport import transport_for
async def main():
    async with transport_for(sys.argv[1]).listen() as listener:
        print(listener.uri.target, flush=True)
        while True:
            async with listener.accept() as channel:
                buffer = memoryview(bytearray(1 << 20))
                while await channel.receive_some(buffer):
                    pass
trio.run(main)
"""
