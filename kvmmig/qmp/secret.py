"""The secret of a monitor's TCP address: both sides prove that they know it before anything else is said.

Before its greeting the monitor sends a challenge, and takes one command only::

    <- {"x-kvmmig-challenge": {"nonce": HEX}}
    -> {"execute": "x-kvmmig-prove", "arguments": {"nonce": HEX, "proof": HEX}}
    <- {"return": {"proof": HEX}}

A nonce is 32 random bytes; a proof is HMAC-SHA256(secret, "kvmmig monitor 1 client" or "... server" | the
monitor's nonce | the client's). Each says whose it is, so it can't be sent back to its maker, and holds for
these nonces only. The client proves first: who only scans a port gets nothing to guess the secret from.

It protects the door and not the way: what follows is neither encrypted nor authenticated.
"""

from __future__ import annotations

import hmac
import os
import secrets
import shlex
import stat
from dataclasses import dataclass, field
from typing import Literal

from kvmmig.errors import BadURI
from kvmmig.transport.toolkit import why

#: The command that proves.
PROVE = "x-kvmmig-prove"
#: The member of the monitor's first message.
CHALLENGE = "x-kvmmig-challenge"

_NONCE = 32  # bytes
_SHORTEST = 16  # bytes. A proof can be tried offline by whoever has heard it, so guesses must be hopeless
_LONGEST = 4096  # bytes


def read_secret(path: str) -> bytes:
    """What a file says, less a last newline. May wait for a disk. Raises `BadURI` where it is no secret."""
    try:
        # It may be a named pipe, which is opened without waiting for its writer, and refused.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadURI(f"{path} is no regular file, so it holds no secret")
            if status.st_uid not in (0, os.geteuid()):
                raise BadURI(f"{path} belongs to user {status.st_uid}, so it is no secret of yours")
            if status.st_mode & 0o077:
                raise BadURI(
                    f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}); make it "
                    f"private by chmod 600 {shlex.quote(path)}"
                )
            secret = file.read(_LONGEST + 1).removesuffix(b"\n")
    except OSError as error:
        raise BadURI(f"can't read the secret in {path}: {why(error)}") from error
    if not _SHORTEST <= len(secret) <= _LONGEST:
        raise BadURI(
            f"the secret in {path} must have {_SHORTEST} to {_LONGEST} bytes; make one by "
            "openssl rand -hex 32"
        )
    return secret


def new_nonce() -> str:
    return secrets.token_hex(_NONCE)


@dataclass(frozen=True)
class Proofs:
    """The proofs of one connection; ``of_server`` is the monitor's nonce, ``of_client`` the client's."""

    secret: bytes = field(repr=False)
    of_server: str
    of_client: str

    def make(self, side: Literal["client", "server"]) -> str:
        text = f"kvmmig monitor 1 {side}\n{self.of_server}\n{self.of_client}"
        return hmac.digest(self.secret, text.encode(), "sha256").hex()

    def check(self, side: Literal["client", "server"], proof: str) -> bool:
        """Whether ``proof`` is that side's. Both nonces must be of full length."""
        whole = len(self.of_server) == len(self.of_client) == 2 * _NONCE
        return whole and hmac.compare_digest(proof.encode(), self.make(side).encode())
