"""The plugin's wheel beside kvmmig's, in a new environment, as a person would use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PLUGIN = REPOSITORY / "examples" / "plugin"

Command = Callable[..., str]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the two wheels; what they need is this one's: nothing is downloaded."""
    where = tmp_path_factory.mktemp("plugin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", REPOSITORY, PLUGIN, "-w", where, cwd=where)
    new = where / "new"
    run(sys.executable, "-m", "venv", "--without-pip", new, cwd=where)
    run(*pip, "--python", new / "bin" / "python", "install", "--no-deps", *where.glob("*.whl"), cwd=where)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (new / "lib" / version / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return new


@pytest.fixture
def kvmmig(environment: Path, tmp_path: Path) -> Iterator[Command]:
    """The new environment's command; the machines that it leaves are ended."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)

    def command(*arguments: str) -> str:
        path = environment / "bin" / "kvmmig"
        return run(path, *arguments, cwd=tmp_path, XDG_RUNTIME_DIR=str(runtime), COLUMNS="200")

    yield command
    for machine in json.loads(command("ls", "--json")):
        command("quit", machine["name"])


def test_the_environment_has_its_own_kvmmig_and_the_plugin(environment: Path, tmp_path: Path) -> None:
    said = run(
        environment / "bin" / "python",
        "-c",
        "import kvmmig, kvmmig_parts; print(kvmmig.__file__, kvmmig_parts.__file__)",
        cwd=tmp_path,
    )
    assert [Path(path).is_relative_to(environment) for path in said.split()] == [True, True]


def test_transports_shows_both_with_their_package(kvmmig: Command) -> None:
    shown = kvmmig("transports")
    assert "a saved guest in numbered parts, beside a manifest (from kvmmig-parts 0.1.0)" in shown
    assert "compresses what is sent (from kvmmig-parts 0.1.0)" in shown


def test_its_own_test_passes_there(environment: Path, tmp_path: Path) -> None:
    for name in ("test_parts.py", "pyproject.toml"):
        (tmp_path / name).write_text((PLUGIN / name).read_text())
    pytest_there = (environment / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # Each direction is like the other: one will do here.
    said = run(*pytest_there, "-k", "not way_back", cwd=tmp_path)
    assert " passed" in said


@pytest.mark.kvm
def test_a_guest_is_saved_and_restored_and_moved_by_it(kvmmig: Command, tmp_path: Path) -> None:
    def state(name: str) -> str:
        return str(json.loads(kvmmig("status", name, "--json"))["status"])

    moved = f"zlib+unix:{tmp_path}/socket"
    stored = f"zlib+parts:{tmp_path}/guest?size=1MiB&zlib.level=1"
    kvmmig("run", "dirtier", "--memory", "16MiB", "--set", "hot=256KiB", "--name", "a", "--detach")
    kvmmig("migrate", "a", stored)
    assert len(list(tmp_path.glob("guest.*"))) > 1
    kvmmig("run", "--incoming", stored, "--name", "b", "--detach")
    assert state("b") == "running"
    kvmmig("run", "--incoming", moved, "--name", "c", "--detach")
    kvmmig("migrate", "b", moved)
    assert state("c") == "running"
