"""Holds structures, constants and request numbers to <linux/kvm.h>, by compiling a C program against it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmmig.kvm import abi, ioctl

STRUCTURES = {name: kind for name, kind in vars(abi).items() if name.startswith("kvm_")}
CONSTANTS = {name: value for name, value in vars(abi).items() if name.startswith("KVM_")}
REQUESTS = {name: value for name, value in vars(ioctl).items() if name.startswith("KVM_")}


def fields(kind: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """Each field's path as C writes it, its offset and its size; nested structures too."""
    for name, field_type, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        if name in getattr(kind, "_anonymous_", ()):
            yield from fields(field_type, prefix, offset)
            continue
        yield prefix + name, offset, ctypes.sizeof(field_type)
        if hasattr(field_type, "_fields_"):
            yield from fields(field_type, f"{prefix}{name}.", offset)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says: expression -> value."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("<linux/kvm.h> is not installed")
    expressions = [f"{name}" for name in (*CONSTANTS, *REQUESTS)]
    for name, kind in STRUCTURES.items():
        expressions.append(f"sizeof(struct {name})")
        for path, _, _ in fields(kind):
            expressions.append(f"offsetof(struct {name}, {path})")
            expressions.append(f"sizeof(((struct {name} *)0)->{path})")
    prints = "\n".join(f'printf("%lu\\n", (unsigned long)({text}));' for text in expressions)
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {{\n{prints}\n}}\n"
    )
    subprocess.run(["gcc", "-o", folder / "abi", source], check=True, timeout=60)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True, timeout=60).stdout
    return dict(zip(expressions, map(int, output.split()), strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_has_the_size_and_the_offsets_of_the_kernels(name: str, kernel: dict[str, int]) -> None:
    kind = STRUCTURES[name]
    assert ctypes.sizeof(kind) == kernel[f"sizeof(struct {name})"]
    for path, offset, size in fields(kind):
        assert offset == kernel[f"offsetof(struct {name}, {path})"], path
        assert size == kernel[f"sizeof(((struct {name} *)0)->{path})"], path


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_has_the_kernels_value(name: str, kernel: dict[str, int]) -> None:
    assert CONSTANTS[name] == kernel[name]


@pytest.mark.parametrize("name", REQUESTS)
def test_request_has_the_kernels_number(name: str, kernel: dict[str, int]) -> None:
    assert REQUESTS[name] == kernel[name]


def test_every_request_number_has_one_name() -> None:
    assert {value: name for name, value in REQUESTS.items()} == ioctl.REQUEST_NAMES
    assert len(ioctl.REQUEST_NAMES) == len(REQUESTS)
