"""Certificates and keys in a directory, as QEMU and libvirt name them, and what can be wrong with them.

======================================  ===========================================
``ca-cert.pem``                         who signs the other side's certificate
``server-cert.pem``, ``server-key.pem``  the destination's own
``client-cert.pem``, ``client-key.pem``  the source's own
======================================  ===========================================
"""

from __future__ import annotations

import os
import shlex
import ssl
from collections.abc import Callable
from pathlib import Path

from kvmmig.errors import ConnectFailed
from kvmmig.transport import Side
from kvmmig.transport.toolkit import why

#: ALPN's name of what is spoken inside. RFC 7301.
PROTOCOL = "kvmmig/1"

_NOT_TLS = "it does not speak TLS; is tls+ in its URI too?"
_REFUSED = "it refuses this side's certificate: "
# X509_V_ERR_*, <openssl/x509_vfy.h>
_UNVERIFIED = {
    9: "its certificate is not valid yet; are both clocks right?",
    10: "its certificate has expired",
    18: "its certificate is not signed by the CA in ca-cert.pem",
    19: "its certificate is not signed by the CA in ca-cert.pem",
    20: "its certificate is not signed by the CA in ca-cert.pem",
    21: "its certificate is not signed by the CA in ca-cert.pem",
    26: "its certificate is not meant for this use",
}
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate, and must",
    "WRONG_VERSION_NUMBER": _NOT_TLS,
    "HTTP_REQUEST": _NOT_TLS,
    "HTTPS_PROXY_REQUEST": _NOT_TLS,
    "UNEXPECTED_MESSAGE": _NOT_TLS,
    "UNSUPPORTED_PROTOCOL": "it does not speak TLS 1.3",
    "BAD_PROTOCOL_VERSION_NUMBER": "it does not speak TLS 1.3",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "bytes were changed on the way",
}
# What comes behind "ALERT_" in the name of an alert from the other side. RFC 8446, section 6.2.
_ALERTS = {
    "UNKNOWN_CA": _REFUSED + "it does not know the CA that signed it",
    "CERTIFICATE_EXPIRED": _REFUSED + "it has expired, or is not valid yet",
    "BAD_CERTIFICATE": _REFUSED + "it is damaged, or for another name",
    "CERTIFICATE_REVOKED": _REFUSED + "it was revoked",
    "UNSUPPORTED_CERTIFICATE": _REFUSED + "it is not meant for this use",
    "CERTIFICATE_UNKNOWN": _REFUSED + "it can't be verified there",
    "CERTIFICATE_REQUIRED": "it wants a certificate, and this side shows none",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3",
    "BAD_RECORD_MAC": "it says that bytes were changed on the way",
}


def load(directory: str, side: Side, *, mutual: bool, name_is_checked: bool) -> ssl.SSLContext:
    """TLS 1.3 with what is in ``directory``. Raises `ConnectFailed`. May wait for a disk.

    ``mutual``: the source shows a certificate, and the destination wants one. ``name_is_checked`` is for the
    source, whose library then compares the name as well.
    """
    destination = side is Side.DESTINATION
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if destination else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL])
    if destination:
        context.num_tickets = 0  # no connection is resumed, and nobody would read them
        context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
    else:
        context.check_hostname = name_is_checked
    where = Path(directory)
    if mutual or not destination:
        path = where / "ca-cert.pem"
        try:
            context.load_verify_locations(_readable(path))
        except ssl.SSLError as error:
            raise ConnectFailed(f"{path} holds no certificate in PEM: {_plain(error)}") from error
    if mutual or destination:
        name = "server" if destination else "client"
        certificate, key = where / f"{name}-cert.pem", where / f"{name}-key.pem"
        _require_private(key)
        try:
            context.load_cert_chain(_readable(certificate), _readable(key), password=_no_password(key))
        except ssl.SSLError as error:
            raise ConnectFailed(f"{certificate} and {key} are no pair in PEM: {_plain(error)}") from error
    return context


def sentence(error: ssl.SSLError) -> str:
    """What is wrong, as a clause about the other side: ``its certificate has expired``."""
    if isinstance(error, ssl.SSLCertVerificationError):
        known = _UNVERIFIED.get(error.verify_code)
        return known or f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "it ended the connection"
    reason = error.reason or ""
    _, alert, name = reason.partition("ALERT_")
    if alert:
        return _ALERTS.get(name) or f"it says {name.lower().replace('_', ' ')}"
    return _REASONS.get(reason) or _plain(error)


def _readable(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ConnectFailed(f"can't read {path}: {why(error)}") from error


def _require_private(key: Path) -> None:
    """As ssh does: a key that others can read is no secret."""
    try:
        found = key.stat()
    except OSError as error:
        raise ConnectFailed(f"can't read {key}: {why(error)}") from error
    if found.st_mode & 0o077:
        raise ConnectFailed(
            f"{key} is open to other users (mode {found.st_mode & 0o777:04o}); make it private by "
            f"chmod 600 {shlex.quote(str(key))}"
        )
    if found.st_uid not in (0, os.geteuid()):
        raise ConnectFailed(f"{key} belongs to the user {found.st_uid}, who can read and change it")


def _no_password(key: Path) -> Callable[[], str]:
    def ask() -> str:
        raise ConnectFailed(f"{key} is encrypted with a password, and nobody can be asked for it here")

    return ask


def _plain(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
