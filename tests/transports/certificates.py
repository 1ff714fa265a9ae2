"""Directories of certificates for the tests of ``tls+``, under the names that QEMU and libvirt use."""

from __future__ import annotations

import ssl
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import trustme

NAME = "kvmmig.example"


def make(
    where: Path,
    ca: trustme.CA | None = None,
    *,
    trusts: trustme.CA | None = None,
    names: tuple[str, ...] = (NAME, "127.0.0.1", "::1"),
    until: datetime | None = None,
) -> Path:
    """All five files. ``ca`` signs both sides' certificates; ``trusts`` is the CA in ``ca-cert.pem``."""
    ca = ca or trustme.CA()
    where.mkdir(parents=True, exist_ok=True)
    (trusts or ca).cert_pem.write_to_path(str(where / "ca-cert.pem"))
    for side in ("server", "client"):
        made = ca.issue_cert(*names, not_after=until)
        made.cert_chain_pems[0].write_to_path(str(where / f"{side}-cert.pem"))
        key = where / f"{side}-key.pem"
        made.private_key_pem.write_to_path(str(key))
        key.chmod(0o600)
    return where


def fingerprint(certificate: Path) -> str:
    return sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()
