"""The toolkit's names are imported when they are first used, and are what they are called."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

from kvmmig.transport import toolkit


def test_who_needs_a_socket_does_not_wait_for_numpy() -> None:
    program = "import sys, kvmmig.transport.toolkit as t; t.TcpChannel; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_module_hides_a_name() -> None:
    """A module that has been imported is an attribute of its package."""
    for module in pkgutil.iter_modules(toolkit.__path__):
        importlib.import_module(f"{toolkit.__name__}.{module.name}")
    modules = {name for name in toolkit.__all__ if isinstance(getattr(toolkit, name), ModuleType)}
    assert modules == {"tcpsockets", "unixsockets"}
