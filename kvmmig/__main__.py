"""``python -m kvmmig``."""

from __future__ import annotations

import sys

from kvmmig.cli import main

if __name__ == "__main__":
    sys.exit(main())
