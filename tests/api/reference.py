"""``python -m tests.api.reference``: writes docs/api.md from the docstrings of the public names.

The sources are read by griffe, the reader behind mkdocstrings; nothing is imported. Its own Markdown printer
(griffe2md) gives every attribute a heading and hides what must be awaited, so the printing is done here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import griffe

import kvmmig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 100

INTRO = """\
# The Python API

All that is public, from the docstrings; `make api` writes this page. Every name is `kvmmig.NAME`, and is
imported when it is first used; those in a group that is called by a package are that package's. What must be
awaited, or opened by `async with`, is written so. Memory and streams are in bytes, times in seconds, rates in
bytes a second. Everything runs on [trio](https://trio.readthedocs.io), in whatever thread trio runs.
Whatever is refused, or fails, is a [`KvmmigError`](#kvmmigerror) whose text is a sentence for the person at
the keyboard.

The examples are as one types them into `python -m trio`, with `import kvmmig, trio`
before them; a test runs them.
"""


@dataclass(frozen=True)
class Group:
    """A part of the page."""

    title: str
    text: str
    names: str = ""
    #: Instead of names: a package, of which all is shown that it exports and that no other group has.
    package: str = ""


GROUPS = (
    Group("A guest's life", "", "open_machine migrate receive"),
    Group(
        "Control from outside",
        "A monitor speaks QMP; [monitor.md](monitor.md) has its commands.",
        "Monitor QMPClient Event QMPError MachineControl Outcome",
    ),
    Group(
        "Machines",
        "[`examples/run_and_pause.py`](../examples/run_and_pause.py) uses one. The states that it goes "
        "through, and which command is allowed in which, are in [architecture.md](architecture.md).",
        "Machine MachineConfig Program Entry State Ending GuestMemory",
    ),
    Group(
        "Migrations",
        "What `migrate` and `receive` are made of, for those who want to watch one, or to change it, while "
        "it runs.",
        "OutgoingMigration IncomingMigration Limits MigrationStatistics Phase RoundFigures TimelineEvent "
        "Durations PageMap",
    ),
    Group(
        "Policies",
        "After each round a policy decides how the migration goes on; "
        "[`examples/own_policy.py`](../examples/own_policy.py) is one of one's own.",
        "Policy Decision Continue Stop GiveUp "
        "DowntimeLimit MaxRounds NoProgress Saving Stopped RateAdaptive AutoConverge FirstOf",
    ),
    Group(
        "Transports",
        "[transports.md](transports.md) has those that there are, "
        "[transports/README.md](../transports/README.md) tells how to write one.",
        "transport_for register register_wrapper Transport TransportURI Option Listener SendChannel "
        "ReceiveChannel Channel Knob Wrapper Side PassingChannel",
    ),
    Group(
        "`kvmmig.transport`",
        "Beside those above. These are `kvmmig.transport.NAME`.",
        package="kvmmig.transport",
    ),
    Group(
        "`kvmmig.transport.toolkit`",
        "What the built-in transports are made of. These are `kvmmig.transport.toolkit.NAME`.",
        package="kvmmig.transport.toolkit",
    ),
    Group(
        "`kvmmig.machine`",
        "Beside those above. These are `kvmmig.machine.NAME`.",
        package="kvmmig.machine",
    ),
    Group(
        "`kvmmig.monitor`",
        "What a `MachineControl` has, and the commands that a `QMPServer` serves for it. These are "
        "`kvmmig.monitor.NAME`.",
        package="kvmmig.monitor",
    ),
    Group(
        "`kvmmig.qmp`",
        "QEMU's protocol, for any table of commands. These are `kvmmig.qmp.NAME`.",
        package="kvmmig.qmp",
    ),
    Group("Errors", "", "KvmmigError"),
)

#: Of these, what is for others than the engine.
ONLY = {"GuestMemory": "size n_pages regions words read write view"}

MORE = """\
## Beside these

| module | what is in it |
|---|---|
| `kvmmig.guests` | the toy guests: `find`, `available`, `assemble`; `check`, which proves memory right |
| `kvmmig.kvm` | bindings to /dev/kvm, one method an ioctl, of use [alone](../examples/two_numbers.py) |
| `kvmmig.testing` | for the authors of transports: the conformance suite, and fakes that pass it |
| `kvmmig.units` | `parse_size("64MiB")`, `format_duration(0.05)` and their like |
"""


def reference() -> str:
    """The page's text. Raises `LookupError` where a public name has no place on it."""
    package = griffe.load("kvmmig", search_paths=[ROOT])
    public = {name: package[f"{home.removeprefix('kvmmig.')}.{name}"] for name, home in kvmmig._HOMES.items()}
    public = {name: what.final_target if what.is_alias else what for name, what in public.items()}
    errors = [name for name, home in kvmmig._HOMES.items() if home == "kvmmig.errors"]
    placed = [name for group in GROUPS for name in group.names.split()]
    if lost := set(public) - set(placed) - set(errors):
        raise LookupError(f"docs/api.md has no place for {sorted(lost)}; add it to a group")
    shown = {
        group: _exported(package, group.package, set(public))
        if group.package
        else {name: public[name] for name in group.names.split()}
        for group in GROUPS
    }
    parts = [INTRO, "\n".join(_contents(shown))]
    for group, entries in shown.items():
        parts += [f"## {group.title}\n", *([group.text + "\n"] if group.text else [])]
        if group.title == "Errors":
            parts.append("\n".join(_error_tree("KvmmigError", [public[name] for name in errors])) + "\n")
        else:
            for what in entries.values():
                parts += _entry(what)
    parts.append(MORE)
    return "\n".join(parts)


def _exported(package: griffe.Object | griffe.Alias, name: str, others: set[str]) -> dict[str, griffe.Object]:
    """What a package exports of its own modules, and ``others`` have not, by name."""
    module = package[name.removeprefix("kvmmig.")]
    found: dict[str, griffe.Object] = {}
    for exported, path in module.imports.items():
        if exported not in others and path.startswith("kvmmig."):
            what = package[path.removeprefix("kvmmig.")]
            found[exported] = what.final_target if what.is_alias else what
    return dict(sorted(found.items()))


def _contents(shown: dict[Group, dict[str, griffe.Object]]) -> Iterator[str]:
    for group, entries in shown.items():
        names = ", ".join(f"[`{name}`](#{name.lower()})" for name in entries)
        yield f"- **{group.title}**: {names}"
    yield ""


def _entry(what: griffe.Object) -> Iterator[str]:
    yield f"### `{what.name}`\n"
    if isinstance(what, griffe.Attribute):
        yield f"`{what.name} = {what.value}`\n"
    elif isinstance(what, griffe.Function):
        yield from _function(what, what.name)
    elif isinstance(what, griffe.Class):
        yield from _class(what)
    else:  # a module
        yield _markdown(what)
        for member in what.members.values():
            if isinstance(member, griffe.Function) and not member.name.startswith("_"):
                yield f"#### `{what.name}.{member.name}`\n"
                yield from _function(member, member.name)


def _class(what: griffe.Class) -> Iterator[str]:
    made = what.members.get("__init__")
    how = made.docstring.value if made is not None and made.docstring is not None else ""
    if isinstance(made, griffe.Function) and made.lineno and not how.startswith("Use `"):
        yield _code(f"{what.name}{_signature(made).removesuffix(' -> None')}")
    yield _markdown(what)
    if how and not how.startswith("Use `"):
        yield _to_markdown(how)
    shown = ONLY[what.name].split() if what.name in ONLY else [n for n in what.members if n[0] != "_"]
    own = [what.members[name] for name in shown]
    attributes = [one for one in own if isinstance(one, griffe.Attribute)]
    lines = [line for attribute in attributes if (line := _attribute(attribute))]
    if lines:
        yield "\n".join(lines) + "\n"
    for member in own:
        if isinstance(member, griffe.Function) and (member.docstring is not None or not what.bases):
            yield f"#### `{what.name}.{member.name}`\n"
            yield from _function(member, member.name)


def _function(what: griffe.Function, name: str) -> Iterator[str]:
    manager = any("contextmanager" in one.callable_path for one in what.decorators)
    signature = _signature(what)
    if manager:
        signature = re.sub(r"-> \w+\[(.*)\]$", r"-> \1", signature)
    how = "async with " if manager else "await " if "async" in what.labels else ""
    yield _code(how + name + signature)
    yield _markdown(what)


def _attribute(what: griffe.Attribute) -> str:
    """One line; empty for what is neither described nor a field."""
    text = what.docstring.value if what.docstring is not None else _comment(what)
    parent = what.parent
    is_member = parent is not None and "class-attribute" in what.labels and what.annotation is None
    if not (text or is_member or ("instance-attribute" in what.labels and what.annotation is not None)):
        return ""
    shown = what.name
    if what.annotation is not None:
        shown += f": {what.annotation}"
    if what.value is not None and "class-attribute" in what.labels and "(" not in str(what.value):
        shown += f" = {what.value}"
    return f"- `{shown}`" + (f": {' '.join(_to_markdown(text).split())}" if text else "")


def _comment(what: griffe.Attribute) -> str:
    """What a comment says of it: at the end of its line, or in ``#:`` lines above."""
    assert isinstance(what.filepath, Path)
    assert what.lineno is not None
    lines = what.filepath.read_text().splitlines()
    if match := re.search(r"  #:? (?!noqa|type:)(.*)$", lines[(what.endlineno or what.lineno) - 1]):
        return re.sub(r" {2,}", "; ", match[1])  # two columns of comment
    above: list[str] = []
    for line in reversed(lines[: what.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        above.insert(0, line.strip().removeprefix("#:").strip())
    return " ".join(above)


def _error_tree(name: str, errors: list[griffe.Object], depth: int = 0) -> Iterator[str]:
    for error in errors:
        if error.name == name:
            anchor = '<a id="kvmmigerror"></a>' if not depth else ""
            yield f"{'  ' * depth}- {anchor}`{name}`: {' '.join(_markdown(error).split())}"
    for error in errors:
        if isinstance(error, griffe.Class) and [str(base) for base in error.bases] == [name]:
            yield from _error_tree(error.name, errors, depth + 1)


def _signature(what: griffe.Function) -> str:
    """Its parameters and what it returns, on one line or on one line each."""
    text = re.sub(r"^\w+\((self|cls)?(, )?", "(", what.signature())
    text = re.sub(r"(?<== )_\w+", lambda constant: str(what.module[constant[0]].value), text)
    if len(what.name + text) <= WIDTH:
        return text
    end = _closing(text)
    pieces, start, depth = [], 1, 0
    for at, letter in enumerate(text[:end]):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 1:
            pieces.append(text[start:at].strip())
            start = at + 1
    pieces.append(text[start:end].strip())
    return "(\n" + "".join(f"    {piece},\n" for piece in pieces) + text[end:]


def _closing(text: str) -> int:
    depth = 0
    for at, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if not depth:
            return at
    raise ValueError(text)


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def _markdown(what: griffe.Object) -> str:
    return _to_markdown(what.docstring.value) if what.docstring is not None else ""


def _to_markdown(text: str) -> str:
    """A docstring's text: ``>>>`` and what follows a ``::`` become blocks of code."""
    parts: list[str] = []
    literal = False
    for part in re.split(r"\n{2,}(?=\S)|\n{2,}(?= {4})", textwrap.dedent(text).strip()):
        if part.startswith(">>>"):
            parts.append(_code(part, "pycon").rstrip())
        elif literal:
            literal = False
            parts.append(_code(textwrap.dedent(part)).rstrip())
        else:
            literal = part.endswith("::")
            parts.append(re.sub(r"``(.+?)``", r"`\1`", part.removesuffix(":") if literal else part))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(f"written: {PAGE.relative_to(ROOT)}")
