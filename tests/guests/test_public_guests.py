"""Guests as books and courses have them: each runs, or ends with a sentence that a beginner can act on."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from kvmmig.guests.programs import find_program
from kvmmig.machine import Ending, MachineConfig, Program
from kvmmig.machine.machine import Machine
from tests.assembling import need_nasm

from .conftest import Move, Running, Screen, machine_with

pytestmark = pytest.mark.kvm

HERE = Path(__file__).parent / "public"
LINKER_SCRIPT = Path(__file__).parents[2] / "kvmmig/guests/skeletons/guest.ld"
MEMORY = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Public:
    """What a guest prints, how it ends, and what the report then says. ``typed`` waits for it."""

    prints: str = ""
    ends: str
    says: str = ""
    status: int = 0
    typed: bytes = b""


GUESTS = {
    "hello.asm": Public(prints="Hello World\r\n", ends="halted", says="0000:7c0d with interrupts off"),
    "disk.asm": Public(prints="0xdada 0xface ", ends="halted", says="goes round for ever at 0000:7c23"),
    "protected.asm": Public(
        prints="Started in 16-bit Real Mode",
        ends="halted",
        says="| Successfully landed in 32-bit Protected Mode",
    ),
    "no-cli.asm": Public(
        prints="Started in 16-bit Real Mode",
        ends="crash",
        says="the timer's first tick is a fault; say cli before",
    ),
    "long.asm": Public(prints="64 bits!", ends="halted", says="with interrupts off"),
    "loader.asm": Public(prints="3 kernel at 1000:0000", ends="halted", says="no interrupt leads out"),
    "game.asm": Public(prints="You won in 3 steps\r\n", ends="reset", typed=b"\x1b[Cddq"),
    "floppy.asm": Public(
        prints="second stage, press a key\r\n" + 2 * "the last sector\r\n", ends="exit", typed=b"\n"
    ),
    "dos.asm": Public(ends="crash", says="int 21h with AH=09h before 0000:7c07"),
    "graphics.asm": Public(ends="crash", says="video mode 13h, graphics; there is no screen here"),
    "linux.s": Public(ends="crash", says="an operating system, and there is none here"),
    "recursion.c": Public(ends="crash", says="its stack ran over: it has 276 KiB"),
    "guest.rs": Public(prints="Hello from Rust, in 8 MiB.\n", ends="exit", status=7),
}
LINKED = ("-static", "-no-pie", "-nostdlib", f"-Wl,-T,{LINKER_SCRIPT}", "-Wl,--build-id=none")
COMPILERS = {
    ".s": ("gcc", *LINKED),
    ".c": (
        "gcc",
        "-O1",
        "-fno-pie",
        "-ffreestanding",
        "-fno-stack-protector",
        "-fcf-protection=none",
        *LINKED,
    ),
    ".rs": (
        *("rustc", "--edition", "2021", "-O", "-C", "panic=abort", "-C", "relocation-model=static"),
        *("-C", "link-args=-nostartfiles " + " ".join(LINKED)),
    ),
}


def program_of(name: str, tmp_path: Path) -> Program:
    """As ``kvmmig run`` would have it; skipped where there is no compiler for it."""
    source = HERE / name
    if source.suffix == ".asm":
        need_nasm()
        return find_program(str(source), memory=MEMORY, cpus=1, settings={})
    command = COMPILERS[source.suffix]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    made = tmp_path / "guest.elf"
    subprocess.run([*command, "-o", made, source], check=True, capture_output=True, cwd=tmp_path)
    return find_program(str(made), memory=MEMORY, cpus=1, settings={})


@pytest.mark.parametrize("name", GUESTS)
async def test_a_public_guest_runs_or_ends_with_a_sentence(name: str, tmp_path: Path) -> None:
    expected, program = GUESTS[name], program_of(name, tmp_path)
    screen = Screen()
    with trio.fail_after(60):
        async with machine_with(program, MEMORY, screen) as machine:
            await machine.start()
            await machine.feed(expected.typed)
            ending = await machine.wait()
            await screen.until(lambda text: text.endswith(expected.prints))
    assert (ending.kind, ending.status) == (expected.ends, expected.status), ending.report
    assert expected.says in ending.report


async def test_a_floppy_moves_with_its_guest(tmp_path: Path, move: Move) -> None:
    program = program_of("floppy.asm", tmp_path)
    screen = Screen()
    with trio.fail_after(60):
        async with machine_with(program, MEMORY, screen) as machine:
            await machine.start()
            await screen.until(lambda text: text.endswith("press a key\r\n"))
            await machine.pause()
            async with move(Running(machine, screen, program)) as moved:
                await moved.machine.feed(b"x")
                assert (await moved.machine.wait()).kind == "exit"
                await moved.screen.until(lambda text: text.endswith(2 * "the last sector\r\n"))


async def test_a_game_goes_on_where_it_has_moved(tmp_path: Path, move: Move) -> None:
    program = program_of("game.asm", tmp_path)
    screen = Screen()
    with trio.fail_after(60):
        async with machine_with(program, MEMORY, screen) as machine:
            await machine.start()
            await machine.feed(b"d")
            await screen.until(lambda text: "[06;07H\x1b7@" in text)
            await machine.pause()
            async with move(Running(machine, screen, program)) as moved:
                await moved.machine.feed(b"dd")
                await moved.screen.until(lambda text: "You won in 3 steps" in text)
                await moved.machine.feed(b"q")
                assert await moved.machine.wait() == Ending("reset")


async def test_a_guest_that_has_halted_may_stay_and_moves_so(tmp_path: Path, move: Move) -> None:
    program = program_of("hello.asm", tmp_path)
    screen = Screen()
    config = MachineConfig(memory=MEMORY, name=program.name, on_halt="stay")
    with trio.fail_after(60):
        async with Machine.open(config, output=screen.output) as machine:
            await machine.load(program)
            await machine.start()
            await screen.until(lambda text: "World" in text)
            with trio.move_on_after(0.8) as over:  # it is looked at meanwhile, and nothing comes of it
                await machine.wait()
            assert over.cancelled_caught
            await machine.pause()
            async with move(Running(machine, screen, program)) as moved:
                assert moved.machine.config.on_halt == "stay"
