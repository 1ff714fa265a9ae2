"""Completion in the shells themselves: what they hand over, and what they make of the answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .test_completion import completions

# bash calls the function so at a Tab; where its own `complete` runs, a terminal would be needed.
_BASH = """
eval "$({kvmmig} completion bash)"
kvmmig() {{ {kvmmig} "$@"; }}
env() {{ local -x "${{@:1:$#-1}}"; kvmmig; }}
compopt() {{ [[ $2 == nospace ]] && unfinished=" unfinished"; return 0; }}
while IFS= read -r COMP_LINE; do
    COMP_POINT=${{#COMP_LINE}} unfinished=""
    _kvmmig_completion kvmmig
    echo "${{COMPREPLY[*]}}$unfinished" | tr '\\n' ' '
    echo
done
"""


def test_bash_gets_what_is_behind_a_colon_or_an_equals_sign(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(_BASH.format(kvmmig=f"{sys.executable} -m kvmmig"))
    lines = {
        "kvmmig migrate a tc": "tcp: unfinished",
        f"kvmmig migrate a file:{script.parent}/scr": f"{script}",
        "kvmmig run dirtier --set ho": "hot= unfinished",
    }
    told = subprocess.run(
        ["bash", str(script)],
        input="".join(f"{line}\n" for line in lines),
        env={**os.environ, "COMP_WORDBREAKS": " \t\n\"'><=;|&(:"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line.strip() for line in told.stdout.splitlines()] == list(lines.values()), told.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("migrate", "a", "throttle+tc"), ["throttle+tcp:"]),
        (("migrate", "a", "file:x?di"), ["file:x?direct="]),
        (("migrate", "a", "'file:x?direct="), ["file:x?direct=on", "file:x?direct=off"]),
        (("migrate", "a", "'throttle+file:x?throttle.r"), ["throttle+file:x?throttle.rate="]),
        (("run", "--incoming", "de"), ["defer"]),
        (("run", "dirtier", "--set", "h"), ["hot="]),
        (("guests", "hel"), ["hello"]),
        (("set", "a", "down"), ["downtime-limit"]),
        (("set", "a", "policy", "max"), ["max-rounds"]),
        (("set", "a", "auto-converge", ""), ["on", "off"]),
        (("set", "a", "timeout", "1min", "on-timeout", "f"), ["force"]),
        (("migrate", "a", "tcp:x:1", "--bandwidth", ""), ["none"]),
    ],
)
def test_uris_settings_and_parameters_are_completed(words: tuple[str, ...], told: list[str]) -> None:
    assert completions(*words) == told


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_leaves_no_space_behind_what_is_unfinished(tmp_path: Path) -> None:
    script = tmp_path / "script"
    command = f"{sys.executable} -m kvmmig"
    script.write_text(
        f'compdef() {{ : }}\neval "$({command} completion zsh)"\ncommands[kvmmig]=x\n'
        f'env() {{ command env "${{@:1:3}}" {command} }}\n'
        'compadd() { print -r -- "${(j: :)@[1,-3]} ${(P)@[-1]}" }\n'
        "words=(kvmmig migrate a tc); CURRENT=4\n_kvmmig_completion\n"
    )
    told = subprocess.run(["zsh", "-f", str(script)], capture_output=True, text=True, check=True)
    assert "-S  tcp:" in told.stdout
