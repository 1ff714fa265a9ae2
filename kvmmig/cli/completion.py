"""What a shell completes besides commands, options and names of machines: URIs, settings, guests' parameters.

A completed word that is to be typed on at, such as ``tcp:``, gets no space behind it. bash takes words apart
at ``:`` and ``=``, which URIs and parameters are full of: so its script sends the line itself, and takes from
each answer what bash has already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from kvmmig.errors import KvmmigError

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" completion type value
    local word="${line##*[[:space:]]}" has=""
    if [[ $word == *[:=]* && $word != [\\'\\"]* && $COMP_WORDBREAKS == *:* ]]; then
        has="${word%%"${word##*[:=]}"}"
    fi
    COMPREPLY=()
    for completion in $(env COMP_WORDS="$line" %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *[:=+/?.] ]] && compopt -o nospace
                COMPREPLY+=("${value#"$has"}")
                ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        typed = split_arg_string(line)
        incomplete = "" if not typed or line[-1].isspace() else typed.pop()
        return typed[1:], incomplete


class _Zsh(ZshComplete):
    source_template = ZshComplete.source_template.replace(
        "        compadd -U -V unsorted -a completions\n",
        "        local -a unfinished=(${(M)completions:#*[:=+/?.]})\n"
        "        local -a finished=(${completions:#*[:=+/?.]})\n"
        "        compadd -U -V unsorted -a finished\n"
        "        compadd -U -V unsorted -S '' -a unfinished\n",
    )


add_completion_class(_Bash, "bash")
add_completion_class(_Zsh, "zsh")


def script(shell: str, command: click.Command) -> str:
    """What makes a shell complete ``command``, to be evaluated by it."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(command, {}, "kvmmig", "_KVMMIG_COMPLETE")
    return made.source_template % made.source_vars()


def matching(candidates: Iterator[str] | list[str], incomplete: str) -> list[CompletionItem]:
    """Those that begin as what has been typed does."""
    return [CompletionItem(each) for each in candidates if each.startswith(incomplete)]


class URI(click.ParamType[str]):
    """Where a guest goes, or comes from: its scheme, its wrappers, a path, the options that they have."""

    name = "uri"

    def __init__(self, *, also: str = "") -> None:
        """``also`` is a word that is understood in the place of a URI."""
        self._also = also

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        with suppress(KvmmigError):  # the command will say what is wrong with it
            also = [self._also] if self._also else []
            return matching([*also, *_uris(incomplete)], incomplete)
        return []


def _uris(typed: str) -> Iterator[str]:
    from kvmmig.transport.registry import registrations, wrapper_registrations

    head, colon, rest = typed.partition(":")
    *around, scheme = head.split("+")
    before = "".join(f"{name}+" for name in around)
    if not colon:
        yield from (f"{before}{one.scheme}:" for one in registrations())
        names = (one.scheme for one in wrapper_registrations())
        yield from (f"{before}{name}+" for name in names if name not in around)
        return
    target, question, options = rest.partition("?")
    transport = next((one.load() for one in registrations() if one.scheme == scheme), None)
    if transport is None:
        return
    if not question:
        if transport.target_is_path or scheme == "unix":
            yield from (f"{head}:{path}" for path in _paths(target))
        return
    known = {option.name: option for option in transport.options}
    for one in wrapper_registrations():
        if one.scheme in around:
            known |= {f"{one.scheme}.{option.name}": option for option in one.load().options}
    *given, last = options.split("&")
    name, equals, _ = last.partition("=")
    start = f"{head}:{target}?" + "".join(f"{each}&" for each in given)
    if equals:
        yield from (f"{start}{name}={choice}" for choice in (known[name].choices if name in known else ()))
        return
    for each, option in known.items():
        if each not in {other.partition("=")[0] for other in given}:
            yield f"{start}{each}.file=" if option.secret else f"{start}{each}="


def _paths(typed: str) -> Iterator[str]:
    folder, _ = os.path.split(typed)
    with suppress(OSError):
        for entry in sorted(os.scandir(folder or "."), key=lambda entry: entry.name):
            yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")


class SettingOrValue(click.ParamType[str]):
    """What ``kvmmig set`` takes: a setting's name, then its value, and so on."""

    name = "setting"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from kvmmig.cli.setting_table import POLICY, SETTINGS, SWITCHES

        given: tuple[str, ...] = ctx.params.get("settings") or ()
        if len(given) % 2:
            return matching(_values(given[-1]), incomplete)
        return matching([name for name in (*SETTINGS, *SWITCHES, POLICY) if name not in given], incomplete)


def _values(setting: str) -> list[str]:
    from kvmmig.cli.setting_table import BY_ANY_NAME, ON_OR_OFF, POLICY, SWITCHES

    if setting == POLICY:
        from kvmmig.monitor.policies import POLICIES

        return [policy.name for policy in POLICIES]
    if setting in SWITCHES:
        return list(ON_OR_OFF)
    return list(BY_ANY_NAME[setting].choices) if setting in BY_ANY_NAME else []


class SettingValue(click.ParamType[str]):
    """The value of one setting, as ``kvmmig set`` takes it."""

    def __init__(self, setting: str) -> None:
        self.name = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from kvmmig.cli.setting_table import SETTINGS

        try:
            SETTINGS[self.name].parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return matching(_values(self.name), incomplete)


class ParameterSetting(click.ParamType[tuple[str, str]]):
    """A toy guest's parameter: hot=64MiB."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, sign, setting = value.partition("=")
        if not (name and sign and setting):
            self.fail(f"{value!r} is not a setting; write it like hot=64MiB", param, ctx)
        return name, setting

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from kvmmig.guests import available, find

        guest = ctx.params.get("guest")
        with suppress(KvmmigError):
            guests = available() if guest is None else (find(guest),)
            names = {parameter.name: None for each in guests for parameter in each.parameters}
            return matching([f"{name}=" for name in names], incomplete)
        return []
