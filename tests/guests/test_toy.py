"""Toy guests as files: headers, parameters, and how they are found."""

from __future__ import annotations

import string
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.errors import BadConfig, BadImage
from kvmmig.guests import Parameter, ToyGuest, available, find
from kvmmig.machine import Entry
from tests.assembling import need_nasm

MIB = 1 << 20
HEADER = "; mine: does a thing\n;@ entry long64\n"


def test_the_built_in_guests_are_there() -> None:
    assert [guest.name for guest in available()] == ["dirtier", "echo", "heartbeat", "hello", "registers"]
    assert all(find(guest.name) is guest for guest in available())


@pytest.mark.parametrize("guest", available(), ids=lambda guest: guest.name)
def test_every_built_in_guest_is_called_as_its_file_is_and_its_defaults_fit_the_least_memory(
    guest: ToyGuest,
) -> None:
    assert guest.path == f"{guest.name}.asm"
    for memory in (4 * MIB, 64 * MIB, 64 << 30):
        assert guest.program(memory=memory, cpus=16, settings={}).image


def test_the_header_says_what_a_guest_is() -> None:
    guest = ToyGuest.parse(HEADER + ";@ param hot = 64MiB   how much\n;@ check dirtier\nnop\n", "mine.asm")
    assert (guest.name, guest.summary, guest.entry) == ("mine", "does a thing", Entry.LONG64)
    assert guest.parameters == (Parameter("hot", "64MiB", "how much"),)
    assert guest.check == "dirtier"


names = st.text(string.ascii_lowercase + string.digits + "_", max_size=8).map("p_".__add__)
words = st.text(string.ascii_letters + string.digits + " .,;:'=;@", max_size=30).map(" ".join("x").__add__)


@given(
    name=names,
    summary=words,
    entry=st.sampled_from([Entry.REAL16, Entry.LONG64]),
    parameters=st.dictionaries(names, st.tuples(st.integers(0, 2**62), words), max_size=5),
)
def test_every_header_comes_back_as_it_was_written(
    name: str, summary: str, entry: Entry, parameters: dict[str, tuple[int, str]]
) -> None:
    lines = [f"; {name}: {summary}", f";@ entry {entry}"]
    lines += [f";@ param {key} = {default} {text}" for key, (default, text) in parameters.items()]
    guest = ToyGuest.parse("\n".join([*lines, "nop"]), "x.asm")
    assert (guest.name, guest.summary, guest.entry) == (name, summary.strip(), entry)
    assert guest.parameters == tuple(
        Parameter(key, str(default), text.strip()) for key, (default, text) in parameters.items()
    )


@given(st.text() | st.text().map((HEADER + ";@").__add__))
def test_any_text_is_a_header_or_a_bad_image(text: str) -> None:
    with suppress(BadImage):
        ToyGuest.parse(text, "x.asm")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (";@ entry real16\nnop\n", "x.asm:1: a guest begins with its name"),
        ("; mine: does a thing\n;@ check dirtier\n", "x.asm: it does not say how it starts"),
        ("; mine: does a thing\n;@ entry elf\n", "x.asm:2: write ;@ entry real16 or ;@ entry long64"),
        (HEADER + ";@ check nothing\n", "x.asm:3: the host can check dirtier: ;@ check nothing"),
        (HEADER + ";@ parm a = 1\n", "x.asm:3: after ;@ comes entry, param or check: ;@ parm a = 1"),
        (HEADER + ";@ param A = 1\n", "x.asm:3: write ;@ param name = default"),
        (HEADER + ";@ param a = many\n", "x.asm:3: 'many' is not a size"),
        (HEADER + ";@ param a = 1\n;@ param a = 2\n", "x.asm:4: a is there already"),
        (HEADER + ";@ param a = 1KiB|120%\n", "x.asm:3: '1KiB|120%' is not a size"),
    ],
)
def test_a_wrong_header_names_file_and_line(source: str, sentence: str) -> None:
    with pytest.raises(BadImage) as caught:
        ToyGuest.parse(source, "x.asm")
    assert str(caught.value).startswith(sentence)


def test_parameters_stay_with_the_program_in_their_order() -> None:
    guest = ToyGuest.parse(HEADER + ";@ param a = 1KiB\n;@ param b = 2\n", "x.asm", image=b"\x90")
    program = guest.program(memory=4 * MIB, cpus=3, settings={"b": "5k"})
    assert list(program.parameters.items()) == [("a", 1024), ("b", 5120)]
    assert (program.name, program.entry, program.image) == ("mine", Entry.LONG64, b"\x90")


def test_a_default_may_be_a_share_of_the_memory_and_what_is_given_is_not_changed() -> None:
    (parameter,) = ToyGuest.parse(HEADER + ";@ param a = 64MiB|25%  b\n", "x.asm").parameters
    assert str(parameter) == "a=64MiB, at most 25% of the memory"
    assert parameter.value(None, 1 << 30) == 64 * MIB
    assert parameter.value(None, 64 * MIB) == 16 * MIB
    assert parameter.value("60MiB", 64 * MIB) == 60 * MIB


def test_a_parameter_may_be_one_of_several_words() -> None:
    (parameter,) = ToyGuest.parse(HEADER + ";@ param a = red|green|blue  b\n", "x.asm").parameters
    assert [parameter.value(given, MIB) for given in (None, "red", "blue")] == [0, 0, 2]
    with pytest.raises(ValueError, match="it can't be 'pink'; use red, green, blue"):
        parameter.value("pink", MIB)


def test_a_source_without_a_header_is_taken_as_it_is() -> None:
    guest = ToyGuest.parse("; my first one\nnop\n", "first.asm")
    assert (guest.name, guest.entry, guest.parameters) == ("first", None, ())


def test_an_error_in_a_source_names_the_line_of_the_file() -> None:
    need_nasm()
    guest = ToyGuest.parse(HEADER + ";@ param a = 1\n\nbogus eax\n", "some/x.asm")
    with pytest.raises(BadImage, match=r"some/x\.asm:5: .*: bogus"):
        guest.program(memory=MIB, cpus=1, settings={})


def test_a_source_without_instructions_is_no_guest() -> None:
    need_nasm()
    with pytest.raises(BadImage, match=r"x\.asm: there is no instruction in it"):
        ToyGuest.parse(HEADER, "x.asm").program(memory=MIB, cpus=1, settings={})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hott": 1}, "dirtier has no parameter 'hott'; it has hot, pace, pattern, stride"),
        ({"hot": "lots"}, "dirtier: hot: 'lots' is not a size"),
        ({"pace": -1}, "dirtier: pace: it can't be -1; use 0 to 9223372036854775807"),
        ({"pace": 1 << 63}, "dirtier: pace: it can't be 9223372036854775808"),
        ({"stride": 0}, "dirtier: stride=0 is no stride"),
        ({"hot": 4097}, "dirtier: hot=4097 is not a whole number of pages"),
        ({"hot": "63MiB"}, "dirtier: hot=63 MiB with stride=1 does not fit into 64 MiB of memory"),
        ({"hot": "32MiB", "stride": 2}, "dirtier: hot=32 MiB with stride=2 does not fit"),
    ],
)
def test_a_nonsense_setting_is_one_sentence(settings: dict[str, int | str], sentence: str) -> None:
    with pytest.raises(BadConfig) as caught:
        find("dirtier").program(memory=64 * MIB, cpus=1, settings=settings)
    assert str(caught.value).startswith(sentence)


def test_the_largest_hot_set_that_an_error_names_is_right() -> None:
    with pytest.raises(BadConfig, match=r"at most hot=\d+KiB") as caught:
        find("dirtier").program(memory=64 * MIB, cpus=3, settings={"hot": "60MiB", "stride": 3})
    most = str(caught.value).rpartition("=")[2]
    assert find("dirtier").program(memory=64 * MIB, cpus=3, settings={"hot": most, "stride": 3})


def test_a_guest_without_parameters_says_so() -> None:
    with pytest.raises(BadConfig, match="hello has no parameter 'hot'; it has none"):
        find("hello").program(memory=MIB, cpus=1, settings={"hot": 1})


def test_too_little_memory_for_the_dirtier_is_one_sentence() -> None:
    with pytest.raises(BadConfig, match=r"dirtier: 2 MiB of memory are too little"):
        find("dirtier").program(memory=2 * MIB, cpus=1, settings={"hot": 0})


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        BadImage, match=r"there is no guest 'dirtyer'; use dirtier, echo, heartbeat, hello, registers, or"
    ):
        find("dirtyer")


def test_a_file_that_is_missing_or_no_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="it can't be read: No such file"):
        find(str(tmp_path / "none.asm"))
    (tmp_path / "disk.img").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadImage, match="this is no assembler source"):
        find(str(tmp_path / "disk.img"))


def test_a_changed_copy_of_the_dirtier_is_found_by_path_and_keeps_its_check(tmp_path: Path) -> None:
    copy = tmp_path / "my-dirtier.asm"
    copy.write_text(find("dirtier").source.replace("; dirtier:", "; my-dirtier:", 1))
    guest = find(str(copy))
    assert guest.name == "my-dirtier"
    need_nasm()
    program = guest.program(memory=64 * MIB, cpus=1, settings={"hot": "8MiB", "pattern": "zipf"})
    assert program.name == "dirtier"
    assert program.parameters == {"hot": 8 * MIB, "stride": 1, "pace": 0, "pattern": 2}
