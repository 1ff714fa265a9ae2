"""Each lab runs as it is given, its solution passes its check, and the check names a student's mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmmig.cli.app import cli
from kvmmig.errors import KvmmigError
from kvmmig.lab.experiments.spec import read_spec
from kvmmig.lab.records import read_records
from kvmmig.lab.teaching.labs import Lab, check_file, check_lab, find_lab, labs, start_lab

LABS = pytest.mark.parametrize("lab", labs(), ids=lambda lab: lab.folder.name)


@LABS
def test_a_lab_has_all_that_it_takes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lab.folder)  # a spec may name a transport of the lab's own
    assert {each.name for each in lab.folder.iterdir()} >= {
        *("README.md", "student.py", "check.py", "solution.py", "TEACHER.md")
    }
    assert lab.title.startswith(f"Lab {lab.number}: ")
    handout = (lab.folder / "README.md").read_text()
    for said in ("**Goal.**", "**Time:**", "## What you should see", "kvmmig lab check ."):
        assert said in handout
    for record in lab.folder.glob("*.jsonl"):
        assert len(read_records([record])[0].sides) == 2
    for spec in lab.folder.glob("*.toml"):
        assert read_spec(spec).name == spec.stem


@LABS
@pytest.mark.kvm
def test_what_a_student_is_given_runs_and_is_not_the_solution(lab: Lab, tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    assert CliRunner().invoke(cli, ["lab", "start", str(lab.number), str(copy)]).exit_code == 0
    assert not {each.name for each in copy.iterdir()} & {"solution.py", "check.py", "TEACHER.md"}
    wrong = check_lab(copy)
    assert wrong
    assert not any("raises" in sentence for sentence in wrong), wrong


@LABS
@pytest.mark.kvm
def test_nothing_is_wrong_with_the_solution(lab: Lab) -> None:
    assert check_file(lab, lab.folder / "solution.py") == []


@pytest.mark.kvm
@pytest.mark.slow
@LABS
def test_what_a_student_is_given_and_the_solution_run_by_themselves(lab: Lab, tmp_path: Path) -> None:
    for name in ("student.py", "solution.py"):
        done = subprocess.run(
            [sys.executable, lab.folder / name],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr


MISTAKES = [
    (
        1,
        "exits[type(why).__name__] += 1",
        "if not isinstance(why, Hlt): exits[type(why).__name__] += 1",
        "Hlt",
    ),
    (1, "vcpu.complete_in(answer)", "pass", "is complete_in called for every IoIn"),
    (1, "sregs.cs.base = sregs.cs.selector = 0", "pass", "RuntimeError"),
    (
        2,
        "await trio.to_thread.run_sync(tracker.collect, pages)\n        for",
        "for",
        "the first look has all",
    ),
    (2, "            pages.clear()\n", "", "is the set emptied before each collect?"),
    (2, "await trio.to_thread.run_sync(tracker.stop)", "pass", "the tracker was not stopped"),
    (3, "await machine.pause()", "pass", "WrongState"),
    (
        3,
        "sections = await machine.capture()",
        "sections = await machine.capture()\n    await machine.resume()",
        "was never true at any time",
    ),
    (3, '"sections": [[', '"sections": [] and [[', "StateMismatch"),
    (3, "if zlib.crc32(data[:-4])", "if False and zlib.crc32(data[:-4])", "put a checksum of all of it"),
    (3, "sections, leave_out=leave_out", "sections", "hand on leave_out"),
    (5, "perf_counter() >= end", "not save.more()", "look at the clock after each write"),
    (5, 'return "late"', 'return "full"', "a step that ends by the clock is 'late'"),
    (
        5,
        'step, save)) != "done":\n        if outcome == "full":',
        'step, save)) != "done":\n        if False:',
        "while the pipe is full: wait_writable",
    ),
    (
        6,
        "return await self._socket.sendmsg(buffers[:_MOST_BUFFERS])",
        "for buffer in buffers: await trio.SocketStream(self._socket).send_all(buffer)\n"
        "            return sum(map(len, buffers))",
        "check_cancelled_calls_move_nothing: ",
    ),
    (6, "await trio.lowlevel.checkpoint()  #", "pass  #", "check_calls_are_checkpoints: "),
    (
        6,
        'raise ChannelBroken(f"the connection to {self.peer} is broken: {why(error)}") from error',
        "raise",
        "check_dead_receiver_is_noticed: ",
    ),
    (
        4,
        "if figures.expected_downtime <= self.limit:",
        "if figures.round >= 3:",
        "go on as long as it gets better",
    ),
    (4, "self._idle >= 3", "self._idle >= 1", "a single bad round proves nothing"),
    (4, "self._idle >= 3", "False", "stop after five at the most"),
]


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.parametrize(("number", "right", "wrong", "sentence"), MISTAKES)
def test_a_typical_mistake_is_named(
    number: int, right: str, wrong: str, sentence: str, tmp_path: Path
) -> None:
    lab = find_lab(number)
    text = (lab.folder / "solution.py").read_text()
    assert right in text
    start_lab(lab, tmp_path / "mine")
    (tmp_path / "mine/student.py").write_text(text.replace(right, wrong))
    assert sentence in "\n".join(check_lab(tmp_path / "mine"))


def test_a_slip_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "student.py").write_text(
        "class OwnRule:\n    def __init__(self, limit):\n        self.limt\n"
    )
    (sentence,) = check_file(find_lab(4), tmp_path / "student.py")
    assert sentence.startswith("student.py, line 3 (self.limt) raises AttributeError")


def test_a_directory_that_is_there_and_one_that_is_no_lab_are_left_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["lab", "start", "4", str(tmp_path)])
    assert "is there already" in str(done.exception)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KvmmigError, match="was not made by: kvmmig lab start"):
        check_lab(tmp_path)
    assert "there is no lab 77; there are 1, 2, 3" in str(
        CliRunner().invoke(cli, ["lab", "start", "77", "x"]).exception
    )
