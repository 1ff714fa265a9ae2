"""``kvmmig image``: what it says, what it writes, and what its status is. No KVM."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

from kvmmig import stream
from kvmmig.cli.app import cli
from kvmmig.errors import KvmmigError
from kvmmig.image import BLOCK_PAGES, MEMORY_AT, Builder
from kvmmig.kvm import abi

PAGE = 4096
PAGES = 4 * BLOCK_PAGES
HIGH = 4 << 30
MACHINE = {"name": "test", "cpus": 2, "regions": [[0, 3 * BLOCK_PAGES * PAGE], [HIGH, BLOCK_PAGES * PAGE]]}


def write_image(path: Path, memory: npt.NDArray[np.uint64], rip: int = 0x1234) -> None:
    def pages(first: int, count: int) -> memoryview:
        return memory[first : first + count].data.cast("B")

    sections = []
    for cpu in range(2):
        regs, sregs = abi.kvm_regs(rip=rip + cpu, rsp=0x8000), abi.kvm_sregs()
        sregs.cs.selector, sregs.fs.base = 0x33, 0xF5000
        sections.append(stream.Section(f"cpu{cpu}/regs", 1, bytes(regs)))
        sections.append(stream.Section(f"cpu{cpu}/sregs", 1, bytes(sregs)))
    builder = Builder(len(memory), pages)
    zero = np.bitwise_or.reduce(memory, axis=1) == 0
    pieces = builder.write(0, np.ones(len(memory), np.bool_), zero)
    pieces += builder.finish(json.dumps(MACHINE).encode(), sections, running=True, saved_by="a test")
    with path.open("wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)


@pytest.fixture
def memory() -> npt.NDArray[np.uint64]:
    memory = np.zeros((PAGES, PAGE // 8), np.uint64)
    memory[3:5] = 7
    memory[3 * BLOCK_PAGES + 1] = 9  # in the region above the hole
    return memory


@pytest.fixture
def image(tmp_path: Path, memory: npt.NDArray[np.uint64]) -> Path:
    path = tmp_path / "a.img"
    write_image(path, memory)
    return path


def kvmmig(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["image", *map(str, arguments)], standalone_mode=False)


def refused(*arguments: str | Path) -> str:
    result = kvmmig(*arguments)
    assert isinstance(result.exception, KvmmigError), result
    return str(result.exception)


def test_info_says_what_it_is_to_people_and_to_programs(image: Path) -> None:
    shown = kvmmig("info", image).output
    assert "test, 2 vCPU, which ran" in shown
    assert "1 MiB: 3 pages with data, 253 that are zero" in shown
    said = json.loads(kvmmig("info", image, "--json").output)
    assert said["memory"] == PAGES * PAGE
    assert said["machine"] == MACHINE
    assert said["on-disk"] < said["file"]


def test_verify_names_each_damaged_block_and_fails(image: Path) -> None:
    assert kvmmig("verify", image).return_value == 0
    with image.open("r+b") as file:
        for block in (0, 2):  # a hole, too, must be one
            file.seek(MEMORY_AT + block * BLOCK_PAGES * PAGE)
            file.write(b"x")
    result = kvmmig("verify", image)
    assert result.return_value == 1
    assert "the pages 0 to 63 are damaged: their digest" in result.output
    assert "the pages 128 to 191 are damaged: they are not zero" in result.output


def test_diff_names_pages_and_sections(image: Path, tmp_path: Path, memory: npt.NDArray[np.uint64]) -> None:
    other = tmp_path / "b.img"
    write_image(other, memory)
    assert kvmmig("diff", image, other).return_value == 0
    memory[100:110, 5] = 1
    write_image(other, memory, rip=0x5678)
    result = kvmmig("diff", image, other)
    assert result.return_value == 1
    assert "pages 100 to 109" in result.output
    said = json.loads(kvmmig("diff", image, other, "--json").output)
    assert said == {"pages": 10, "runs": [[100, 10]], "sections": ["cpu0/regs", "cpu1/regs"]}


def test_a_core_has_memory_at_its_addresses_and_a_thread_for_each_vcpu(image: Path, tmp_path: Path) -> None:
    core = tmp_path / "a.core"
    assert kvmmig("export", image, core).return_value == 0
    data = core.read_bytes()
    assert struct.unpack_from("<HH", data, 16) == (4, 62), "ET_CORE for x86-64"
    segments = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * number) for number in range(3)]
    (note, _, at, _, _, size, _, _), low, high = segments
    assert note == 4
    assert low[3] == low[4] == 0
    assert high[3] == high[4] == HIGH
    assert data[low[2] + 3 * PAGE :][: 2 * PAGE] == b"\7\0\0\0\0\0\0\0" * 1024
    assert data[high[2] + PAGE] == 9
    assert len(data) == high[2] + high[5]
    notes = data[at : at + size]
    assert len(notes) == 2 * (20 + 336)
    for cpu in range(2):
        registers = struct.unpack_from("<27Q", notes, cpu * 356 + 20 + 112)
        assert registers[16:20] == (0x1234 + cpu, 0x33, 0, 0x8000), "rip, cs, rflags, rsp"
        assert registers[21] == 0xF5000, "fs_base"


def test_flat_memory_lies_where_the_guest_sees_it(image: Path, tmp_path: Path) -> None:
    flat = tmp_path / "a.raw"
    assert kvmmig("export", image, flat, "--as", "flat").return_value == 0
    assert flat.stat().st_size == HIGH + BLOCK_PAGES * PAGE
    assert flat.stat().st_blocks * 512 < 2 << 20
    with flat.open("rb") as file:
        file.seek(HIGH + PAGE)
        assert file.read(8) == b"\x09\0\0\0\0\0\0\0"


def test_converted_there_and_back_it_is_the_same_guest(image: Path, tmp_path: Path) -> None:
    saved, back = tmp_path / "a.stream", tmp_path / "back.img"
    assert "a stream" in kvmmig("convert", image, saved).output
    assert saved.read_bytes().startswith(stream.MAGIC)
    assert "an image" in kvmmig("convert", saved, back).output
    assert kvmmig("diff", image, back).return_value == 0
    assert kvmmig("verify", back).return_value == 0


def test_what_is_refused_is_named_and_an_older_file_stays(image: Path, tmp_path: Path) -> None:
    junk, older = tmp_path / "junk", tmp_path / "older"
    junk.write_bytes(b"no image" * 100)
    older.write_bytes(b"older")
    assert "junk: it is no image" in refused("info", junk)
    assert "can't read" in refused("verify", tmp_path / "none")
    assert "junk: " in refused("convert", junk, older)
    with image.open("r+b") as file:
        file.seek(MEMORY_AT + 3 * PAGE)
        file.write(b"x")
    for command in (("export", image, older), ("convert", image, older)):
        assert "a.img: the pages 0 to 63 are damaged" in refused(*command)
    assert older.read_bytes() == b"older"
