"""``kvmmig new-guest``: what it writes runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio

from kvmmig.errors import BadConfig, BadImage
from kvmmig.guests.programs import find_program
from kvmmig.guests.skeleton import write_skeleton
from tests.assembling import need_nasm

from .conftest import Screen, machine_with


@pytest.mark.kvm
@pytest.mark.parametrize("language", ["asm", "c"])
async def test_a_skeleton_runs_as_it_is(language: str, tmp_path: Path) -> None:
    source, *others = write_skeleton("mine", language, tmp_path)
    if language == "c":
        if not (shutil.which("make") and shutil.which("cc")):
            pytest.skip("there is no C compiler, or no make")
        await trio.run_process(["make", "-C", str(source.parent)], capture_stdout=True)
        source = source.with_suffix(".elf")
    else:
        need_nasm()
    settings = {} if others else {"count": 2}
    program = find_program(str(source), memory=4 << 20, cpus=1, settings=settings)
    screen = Screen()
    with trio.fail_after(30):
        async with machine_with(program, 4 << 20, screen) as machine:
            await machine.start()
            assert (await machine.wait()).kind == "exit"
            await screen.until(lambda text: text == "Hello from mine.\n" * (1 if others else 2))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "Makefile").write_text("all:\n")
    with pytest.raises(BadImage, match=r"Makefile: it is there already"):
        write_skeleton("mine", "c", tmp_path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["Makefile"]


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "x" * 49])
def test_a_name_that_is_none_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="is no name for a guest"):
        write_skeleton(name, "asm", tmp_path)
