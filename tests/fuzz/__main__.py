"""``python -m tests.fuzz [TARGET...] --seconds N``: Atheris looks for inputs that a target can't bear.

It is guided by coverage, and starts from the corpus beside this file. What it finds new goes to build/fuzz;
``--keep`` puts what reaches anything new into the corpus. An input that breaks a target stays there too,
under the name that is printed, and the status is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path("build/fuzz")


def fuzz(name: str, arguments: list[str]) -> None:
    """In a process of its own: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["kvmmig"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all if none")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reaches anything new")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"there is no target {min(unknown)!r}; the targets are {', '.join(TARGETS)}")
    status = 0
    for name in options.targets or TARGETS:
        found, kept = FOUND / name, CORPUS / name
        found.mkdir(parents=True, exist_ok=True)
        print(f"== {name}, {options.seconds} s", flush=True)
        run = [
            sys.executable,
            "-c",
            f"from tests.fuzz.__main__ import fuzz; fuzz({name!r}, [*__import__('sys').argv[1:]])",
        ]
        limits = [f"-max_total_time={options.seconds}", "-max_len=4096", "-rss_limit_mb=2048", "-timeout=10"]
        told = subprocess.run(
            [
                *run,
                *limits,
                "-print_final_stats=1",
                f"-artifact_prefix={kept}/broken-",
                str(found),
                str(kept),
            ],
            check=False,
        )
        status = status or int(told.returncode != 0)
        if options.keep:
            subprocess.run([*run, "-merge=1", str(kept), str(found)], check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
