"""QEMU's parameters and capabilities that mean nothing here.

Tools made for QEMU set what they think the default to be, to be sure of it. So each parameter may be set to
QEMU's default, and each capability switched off: that is how kvmmig works anyway. Anything else is refused,
because it would have no effect. `MigrationParameters` and `CAPABILITIES` do not show them.

As of QEMU 10.0: ``MigrationParameters`` and ``MigrationCapability`` in qapi/migration.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from msgspec import UNSET, UnsetType

from kvmmig.qmp import Arguments
from kvmmig.units import UNSIGNED

DEFAULTS: Mapping[str, object] = {
    "announce_initial": 50,
    "announce_max": 550,
    "announce_rounds": 5,
    "announce_step": 100,
    "avail_switchover_bandwidth": 0,
    "block_bitmap_mapping": [],
    "cpu_throttle_tailslow": False,
    "direct_io": False,
    "max_postcopy_bandwidth": 0,
    "mode": "normal",
    "multifd_channels": 2,
    "multifd_compression": "none",
    "multifd_qatzip_level": 1,
    "multifd_zlib_level": 1,
    "multifd_zstd_level": 1,
    "throttle_trigger_threshold": 50,
    "tls_authz": "",
    "tls_creds": "",
    "tls_hostname": "",
    "vcpu_dirty_limit": 1,
    "x_checkpoint_delay": 20_000,
    "x_vcpu_dirty_limit_period": 1000,
    "xbzrle_cache_size": 64 << 20,
    "zero_page_detection": "multifd",
}

#: Those that can only be off.
ALWAYS_OFF = frozenset(
    {
        *("background-snapshot", "dirty-bitmaps", "dirty-limit", "late-block-activate", "mapped-ram"),
        *("multifd", "postcopy-blocktime", "postcopy-preempt", "postcopy-ram", "rdma-pin-all", "release-ram"),
        *("switchover-ack", "validate-uuid", "x-colo", "x-ignore-shared", "xbzrle", "zero-blocks"),
        "zero-copy-send",
    }
)


class QemuParameters(Arguments, frozen=True):
    """Those of ``migrate-set-parameters`` that can only be as in `DEFAULTS`."""

    ranges: ClassVar = {
        name: UNSIGNED
        for name, default in DEFAULTS.items()
        if isinstance(default, int) and not isinstance(default, bool)
    }
    announce_initial: int | UnsetType = UNSET
    announce_max: int | UnsetType = UNSET
    announce_rounds: int | UnsetType = UNSET
    announce_step: int | UnsetType = UNSET
    avail_switchover_bandwidth: int | UnsetType = UNSET
    block_bitmap_mapping: list[object] | UnsetType = UNSET
    cpu_throttle_tailslow: bool | UnsetType = UNSET
    direct_io: bool | UnsetType = UNSET
    max_postcopy_bandwidth: int | UnsetType = UNSET
    mode: Literal["normal", "cpr-reboot", "cpr-transfer"] | UnsetType = UNSET
    multifd_channels: int | UnsetType = UNSET
    multifd_compression: Literal["none", "zlib", "zstd", "qatzip", "qpl", "uadk"] | UnsetType = UNSET
    multifd_qatzip_level: int | UnsetType = UNSET
    multifd_zlib_level: int | UnsetType = UNSET
    multifd_zstd_level: int | UnsetType = UNSET
    throttle_trigger_threshold: int | UnsetType = UNSET
    tls_authz: str | UnsetType | None = UNSET
    tls_creds: str | UnsetType | None = UNSET
    tls_hostname: str | UnsetType | None = UNSET
    vcpu_dirty_limit: int | UnsetType = UNSET
    x_checkpoint_delay: int | UnsetType = UNSET
    x_vcpu_dirty_limit_period: int | UnsetType = UNSET
    xbzrle_cache_size: int | UnsetType = UNSET
    zero_page_detection: Literal["none", "legacy", "multifd"] | UnsetType = UNSET
