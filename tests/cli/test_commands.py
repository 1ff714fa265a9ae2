"""The small commands, and what all commands share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmmig.cli import catalog, doctor
from kvmmig.cli.app import cli
from kvmmig.errors import KvmUnavailable, TransportError
from kvmmig.guests import available, find
from kvmmig.kvm import System
from kvmmig.transport import Transport
from kvmmig.transport.registry import Registration

from .conftest import Kvmmig

COMMANDS = tuple(cli.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(kvmmig: Kvmmig, command: str) -> None:
    told = kvmmig(command, "--help")
    assert told.process.returncode == 0
    assert "Example" in told.stdout
    assert f"  kvmmig {command}" in told.stdout


def test_help_and_version_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom kvmmig.cli import main\n"
        "for option in ('--help', '--version'):\n"
        "    sys.argv = ['kvmmig', option]\n    assert main() == 0\n"
        "heavy = {'trio', 'numpy', 'rich', 'capstone', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert all(command in told.stdout for command in COMMANDS)
    assert "version" in told.stdout


def test_guests_are_listed_and_printed_just_as_they_are(kvmmig: Kvmmig) -> None:
    listed = kvmmig("guests").stdout
    for guest in available():
        assert guest.name in listed
        for parameter in guest.parameters:
            assert f"{parameter.name}={parameter.default}" in listed
    assert kvmmig("guests", "dirtier").stdout == find("dirtier").source


def test_transports_are_listed_with_their_options(kvmmig: Kvmmig) -> None:
    listed = kvmmig("transports").stdout
    for text in ("tcp:HOST:PORT", "file:PATH", "pipe:PATH", "helper:", "built in", "throttle.rate:"):
        assert text in listed


def test_a_transport_that_can_not_be_imported_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise TransportError("the pigeons have flown")

    broken: Registration[Transport] = Registration("pigeon", "a loft", fail)  # type: ignore[arg-type]  # it never returns
    monkeypatch.setattr(catalog, "registrations", lambda: (broken,))
    catalog.list_transports(as_json=False)
    assert "the pigeons have flown" in capsys.readouterr().out


def test_a_pipe_that_closes_early_is_no_traceback(kvmmig: Kvmmig, tmp_path: Path) -> None:
    shell = f"{sys.executable} -m kvmmig guests dirtier | head -1"
    told = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.stdout.startswith("; dirtier")
    assert told.stderr == ""


@pytest.mark.kvm
def test_the_doctor_runs_a_real_guest(kvmmig: Kvmmig) -> None:
    told = kvmmig("doctor")
    assert told.process.returncode == 0, told
    assert "privilege level 3" in told.stdout
    assert "can work here" in told.stdout


def test_the_doctor_explains_a_host_without_kvm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> System:
        raise KvmUnavailable("/dev/kvm can't be opened: there is no such device; load the module")

    monkeypatch.setattr(System, "open", missing)
    assert doctor.examine(as_json=False) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "load the module" in told
    assert "a real guest not tried" in told
    assert "can't work here" in told


@pytest.mark.kvm
def test_the_doctor_names_a_capability_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(System, "check_extension", lambda self, cap: 0)
    assert doctor.examine(as_json=False) == 1
    told = capsys.readouterr().out
    assert "KVM_CAP_IRQCHIP" in told
    assert "missing" in told
