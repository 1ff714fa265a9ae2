"""QMP, the protocol of QEMU's monitor: a server for a table of commands, and a client.

It knows no machine: what the commands do is the affair of whoever fills the table. See "QEMU Machine Protocol
Specification", docs/interop/qmp-spec.rst in QEMU's sources.
"""

from kvmmig.qmp.client import Event as Event
from kvmmig.qmp.client import QMPClient as QMPClient
from kvmmig.qmp.messages import Arguments as Arguments
from kvmmig.qmp.messages import NoArguments as NoArguments
from kvmmig.qmp.messages import QMPError as QMPError
from kvmmig.qmp.messages import version_info as version_info
from kvmmig.qmp.server import QMPServer as QMPServer
from kvmmig.qmp.session import Session as Session
from kvmmig.qmp.table import CommandTable as CommandTable
