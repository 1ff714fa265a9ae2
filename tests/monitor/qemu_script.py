"""A script as people write them for QEMU's monitor: ``qemu_script.py SOCKET URI``. It knows no kvmmig."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol


def main() -> None:
    monitor, uri = sys.argv[1:]
    qmp = QEMUMonitorProtocol(monitor)
    qmp.connect()
    qmp.cmd("migrate-set-parameters", **{"downtime-limit": 100, "max-bandwidth": 10**9})
    qmp.cmd("migrate", uri=uri)
    while True:
        info: Any = qmp.cmd("query-migrate")
        if info["status"] in ("completed", "failed", "cancelled"):
            break
        time.sleep(0.001)
    qmp.close()
    print(json.dumps(info))


if __name__ == "__main__":
    main()
