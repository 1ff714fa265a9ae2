from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmmig.cli import main
from tests.assembling import assembled, need_nasm

from .conftest import Kvmmig

pytestmark = pytest.mark.kvm

HELLO = "Hello from a KVM guest at privilege level 3.\n"
LETTER_THEN_END = """
    mov dx, 0x3f8
    mov al, 'K'
    out dx, al
    mov al, 5
    out 0xf4, al
    hlt
"""


def boot_sector() -> bytes:
    return assembled(LETTER_THEN_END, bits=16, origin=0x7C00).ljust(510, b"\0") + b"\x55\xaa"


def test_a_toy_guest_prints_and_its_status_is_the_commands(kvmmig: Kvmmig) -> None:
    hello = kvmmig("run", "hello")
    assert (hello.process.returncode, hello.stdout, hello.stderr) == (0, HELLO, "")


def test_a_copy_that_was_changed_by_hand_runs(kvmmig: Kvmmig) -> None:
    need_nasm()
    source = kvmmig("guests", "hello").stdout
    changed = source.replace("Hello", "Howdy").replace("xor eax, eax", "mov eax, 7")
    howdy = kvmmig("run", kvmmig.program("howdy.asm", changed))
    assert howdy.stdout.startswith("Howdy from")
    assert howdy.process.returncode == 7


def test_what_is_typed_reaches_the_guest_and_the_end_of_the_input_does_not_end_it(kvmmig: Kvmmig) -> None:
    echo = kvmmig.start("run", "echo", stdin=subprocess.PIPE)
    echo.wait_for(lambda it: "Ctrl-D" in it.stdout)
    echo.type(b"a line\r")
    echo.wait_for(lambda it: "a line\r\n" in it.stdout)
    echo.type(b"\x04")
    assert echo.end() == 0

    deaf = kvmmig.start("run", "echo")  # its input has ended before it begins
    deaf.wait_for(lambda it: "Ctrl-D" in it.stdout)
    assert deaf.process.poll() is None
    deaf.interrupt()
    assert deaf.end() == 130


def test_input_may_come_from_a_file(kvmmig: Kvmmig, tmp_path: Path) -> None:
    (tmp_path / "typed").write_bytes(b"from a file" * 1000 + b"\x04")
    with (tmp_path / "typed").open("rb") as typed:
        echo = kvmmig.start("run", "echo", stdin=typed.fileno())
        assert echo.end() == 0
    assert echo.stdout.endswith("from a file" * 1000)


def test_a_boot_sector_needs_no_entry(kvmmig: Kvmmig, tmp_path: Path) -> None:
    (tmp_path / "sector").write_bytes(boot_sector())
    ran = kvmmig("run", "sector")
    assert (ran.stdout, ran.process.returncode) == ("K", 5)


def test_a_flat_image_is_asked_how_it_starts(kvmmig: Kvmmig, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(assembled(LETTER_THEN_END, bits=16, origin=0x7C00).ljust(1024, b"\0"))
    assert "--entry real16" in kvmmig("run", "image").stderr
    ran = kvmmig("run", "image", "--entry", "real16", "--memory", "2MiB")
    assert (ran.stdout, ran.process.returncode) == ("K", 5)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to make an ELF with")
def test_an_elf_is_known_by_its_magic(kvmmig: Kvmmig, tmp_path: Path) -> None:
    (tmp_path / "start.s").write_text(
        ".globl _start\n_start: mov $0x3f8, %dx\nmov $'E', %al\nout %al, %dx\nmov $9, %al\nout %al, $0xf4\n"
        "here: jmp here\n"
    )
    link = ["-static", "-nostdlib", "-no-pie", "-Wl,-Ttext-segment=0x200000"]
    subprocess.run(["gcc", *link, "-o", "program", "start.s"], cwd=tmp_path, check=True)
    ran = kvmmig("run", "program")
    assert (ran.stdout, ran.process.returncode) == ("E", 9)


def test_a_crash_is_a_report_and_status_70(kvmmig: Kvmmig) -> None:
    crashed = kvmmig("run", kvmmig.program("crash.asm", "; crash: dies\n;@ entry long64\nud2\n"))
    assert crashed.process.returncode == 70
    assert "the guest crashed" in crashed.stderr
    assert "rip" in crashed.stderr


def test_a_reset_is_a_sentence_and_status_0(kvmmig: Kvmmig) -> None:
    source = "; reset: resets\n;@ entry long64\nmov al, 0xfe\nout 0x64, al\nhere: jmp here\n"
    reset = kvmmig("run", kvmmig.program("reset.asm", source))
    assert reset.process.returncode == 0
    assert "it asked for a reset" in reset.stderr


def test_several_vcpus_and_settings_reach_the_guest(kvmmig: Kvmmig) -> None:
    busy = kvmmig.start("run", "dirtier", "--cpus", "2", "--memory", "16MiB", "--set", "hot=1MiB")
    busy.wait_for(lambda it: "B" in it.stdout and "b" in it.stdout)
    busy.interrupt()
    assert busy.end() == 130
    assert "FAIL" not in busy.stdout


def test_serial_output_is_appended_to_a_file(kvmmig: Kvmmig, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    ran = kvmmig("run", "hello", "--serial", "log")
    assert (ran.process.returncode, ran.stdout) == (0, "")
    assert (tmp_path / "log").read_text() == "before\n" + HELLO


def test_serial_output_goes_to_a_named_pipe(kvmmig: Kvmmig, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert kvmmig("run", "hello", "--serial", "fifo").process.returncode == 0
        assert os.read(reader, 1000).decode() == HELLO
    finally:
        os.close(reader)


def test_an_output_that_breaks_ends_the_guest_with_a_sentence(kvmmig: Kvmmig) -> None:
    source, sink = os.pipe()
    os.close(source)
    busy = kvmmig.start("run", "dirtier", "--memory", "16MiB", "--set", "hot=1MiB", stdout=sink)
    os.close(sink)
    assert busy.end() == 1
    assert (
        busy.stderr == "kvmmig: the guest's serial output can't be written to standard output: Broken pipe\n"
    )


def test_an_output_that_nobody_reads_holds_up_neither_guest_nor_ctrl_c(kvmmig: Kvmmig) -> None:
    source, sink = os.pipe()
    try:
        noise = "; noise: prints for ever\n;@ entry long64\nmov dx, 0x3f8\nmore: out dx, al\njmp more\n"
        noisy = kvmmig.start("run", kvmmig.program("noise.asm", noise), stdout=sink)
        os.close(sink)
        while len(os.read(source, 1)) == 0:
            pass
        noisy.interrupt()
        assert noisy.end() == 130
    finally:
        os.close(source)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["run"], 2, "name a guest or a file"),
        (["run", "nonsense"], 2, "there is no guest 'nonsense'"),
        (["run", "absent.asm"], 2, "absent.asm: it can't be read"),
        (["run", "/"], 1, "/: it is not a regular file"),
        (["run", "hello", "--memory", "3 apples"], 2, "is not a size"),
        (["run", "hello", "--memory", "100"], 2, "did you mean 100MiB"),
        (["run", "hello", "--cpus", "99"], 2, "use 1 to 16"),
        (["run", "hello", "--cpus", "many"], 2, "--cpus"),
        (["run", "hello", "--entry", "real16"], 2, "--entry real16"),
        (["run", "hello", "--entry", "smm"], 2, "--entry"),
        (["run", "hello", "--reserve", "1GiB"], 2, "it needs --incoming URI"),
        (["run", "--incoming", "tcp:127.0.0.1:0", "--reserve", "65GiB"], 2, "use 1MiB to 64GiB"),
        (["run", "hello", "--set", "hot"], 2, "is not a setting"),
        (["run", "hello", "--set", "hot=1"], 2, "hello has no parameter 'hot'"),
        (["run", "dirtier", "--set", "hot=9GiB"], 2, "hot="),
        (["run", "hello", "--serial", "absent/log"], 1, "--serial absent/log"),
        (["run", "hello", "--serial", "/"], 1, "--serial /"),
        (["run", "hello", "--after", "1"], 2, "--migrate-to"),
        (["run", "hello", "--migrate-to", "tcp:x:1", "--after", "soon"], 2, "is not a duration"),
        (["run", "hello", "--migrate-to", "nonsense"], 2, "is not a transport URI"),
        (["run", "hello", "--migrate-to", "pigeon:home"], 2, "pigeon"),
        (["run", "hello", "--migrate-to", "tcp:nonsense"], 2, "tcp:nonsense"),
        (["run", "hello", "--incoming", "tcp:127.0.0.1:0"], 2, "GUEST can't go with it"),
        (["run", "--incoming", "tcp:127.0.0.1:0", "--memory", "1GiB"], 2, "--memory can't go with it"),
        (["run", "--incoming", "tcp:127.0.0.1:0", "--set", "a=1", "--cpus", "2"], 2, "--cpus and --set"),
        (["run", "--incoming", "nonsense"], 2, "is not a transport URI"),
        (["run", "--incoming", "file:absent.img"], 1, "absent.img"),
        (["run", "--incoming", "pipe:absent.img"], 1, "absent.img"),
        (["fly"], 2, "fly"),
        (["guests", "nonsense"], 2, "there is no guest 'nonsense'"),
        (["demo", "--directory", "absent"], 2, "--directory absent"),
        (["demo", "--memory", "65GiB"], 2, "use 1MiB to 64GiB"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    status: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kvmmig", *arguments])
    assert main() == status
    out, err = capfd.readouterr()
    assert out == ""
    *before, last = err.splitlines()
    assert sentence in last
    assert last.startswith(("kvmmig: ",) if status == 1 else ("kvmmig: ", "Error: "))
    if status == 1:
        assert all(line.startswith("kvmmig: waiting for a guest") for line in before)
