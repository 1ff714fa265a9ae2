"""The commands' root: what all of them share. Each group of them stands in a module of its own.

Those modules have the commands as far as ``--help`` needs them; what they do is imported when it is needed.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import sys
from typing import Any

import click

from kvmmig import __version__
from kvmmig.cli.commands_basic import completion, demo, doctor, guests, transports, version
from kvmmig.cli.commands_control import (
    console,
    logs,
    ls,
    pause,
    quit_machine,
    reset,
    resume,
    set_settings,
    status,
    watch,
)
from kvmmig.cli.commands_experiment import experiment
from kvmmig.cli.commands_guest import new_guest
from kvmmig.cli.commands_image import image
from kvmmig.cli.commands_lab import plot, record, stream, trace
from kvmmig.cli.commands_migrate import cancel, migrate, save
from kvmmig.cli.commands_restore import restore
from kvmmig.cli.commands_run import run
from kvmmig.cli.commands_teaching import lab
from kvmmig.cli.printing import echo
from kvmmig.cli.statuses import status_of
from kvmmig.errors import KvmmigError


def run_command() -> int:
    """Run the command of ``sys.argv``. Raises nothing for bad input: that is a sentence and a status."""
    _fill_standard_descriptors()
    try:
        status: Any = cli.main(standalone_mode=False, prog_name="kvmmig")
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        echo(said.getvalue(), err=True, nl=False)
        return error.exit_code
    except click.Abort:
        return 130
    except KvmmigError as error:
        echo(f"kvmmig: {error}", err=True)
        return status_of(error)
    except BrokenPipeError:  # "kvmmig guests | head": python would complain again when it flushes
        sys.stdout = None
        return 1
    return status if isinstance(status, int) else 0


def _fill_standard_descriptors() -> None:
    """Who was started without them would otherwise write to whatever file gets their numbers later."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


# click itself writes help for 50 columns at the least, and for a terminal of fewer that is illegible.
_WIDTH = max(min(shutil.get_terminal_size().columns, 102) - 2, 30)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "terminal_width": _WIDTH})
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def cli() -> None:
    """Run tiny KVM guests and migrate them while they run.

    \b
    Two terminals show what it is for:
      kvmmig run --incoming tcp:127.0.0.1:4444
      kvmmig run dirtier --memory 1GiB --migrate-to tcp:127.0.0.1:4444

    \b
    And one is enough with machines in the background:
      kvmmig run dirtier --name a -m 1GiB -d
      kvmmig status a --watch
      kvmmig save a /var/tmp/a.img
      kvmmig restore /var/tmp/a.img --name b -d
    """


for _command in (
    *(run, restore),
    *(ls, status, watch, console, logs, pause, resume, reset, quit_machine),
    *(migrate, save, cancel, set_settings),
    *(image, record, plot, trace, experiment, stream, lab),
    *(guests, new_guest, transports, doctor, demo, version, completion),
):
    cli.add_command(_command)

#: The words that people bring along from docker, and the commands that mean the same.
ALIASES = {"ps": ls, "stop": quit_machine}
for _name, _command in ALIASES.items():
    _alias = copy.copy(_command)
    _alias.name = _name
    _alias.short_help = f"The same as {_command.name}."
    _alias.epilog = (_command.epilog or "").replace(f"kvmmig {_command.name}", f"kvmmig {_name}")
    cli.add_command(_alias)
