"""``experiment``: many migrations, of which one learns something."""

from __future__ import annotations

from pathlib import Path

import click

from kvmmig.cli.arguments import examples

_spec = click.argument("spec", type=click.Path(path_type=Path))
_out_option = click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the results are.  [default: a directory with the experiment's name]",
)


@click.group(
    short_help="Try many migrations, and compare them.",
    epilog=examples("kvmmig experiment run examples/experiments/dirty-rate.toml"),
)
def experiment() -> None:
    """Try many migrations, as a spec in TOML says, and draw what came of them."""


@experiment.command(
    epilog=examples(
        "kvmmig experiment run examples/experiments/dirty-rate.toml",
        "kvmmig experiment run spec.toml --again starved",
    )
)
@_spec
@_out_option
@click.option(
    "--again",
    type=click.Choice(["starved", "failed"]),
    help="Try those again, too, that were starved of CPU by the host, or did not come to their end.",
)
def run(spec: Path, out: Path | None, again: str | None) -> int:
    """Try every combination of the values in SPEC, each in processes of its own.

    What was tried before is not tried again: after a Ctrl-C, or a kill, the same command goes on.
    """
    from kvmmig.cli.experiments import run_spec

    return run_spec(spec, out, again)


@experiment.command(epilog=examples("kvmmig experiment plot examples/experiments/dirty-rate.toml"))
@_spec
@_out_option
@click.option(
    "--format",
    "kind",
    type=click.Choice(["png", "pdf", "svg"]),
    default="png",
    show_default=True,
    help="What kind of file.",
)
def plot(spec: Path, out: Path | None, kind: str) -> int:
    """Draw the pictures that SPEC asks for, of the results that are there."""
    from kvmmig.cli.experiments import plot_spec

    return plot_spec(spec, out, kind)
