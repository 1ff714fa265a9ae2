"""``image``: what can be done with the image of a saved guest."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import examples, json_option

_path = click.argument("path", type=click.Path())


@click.group(
    short_help="Look at the image of a saved guest, check and convert it.",
    epilog=examples(
        "kvmmig image info a.img", "kvmmig image verify a.img", "kvmmig image export a.img a.core"
    ),
)
def image() -> None:
    """Look at the image of a saved guest, check it, compare it, and convert it.

    "kvmmig save" leaves an image, in which each page of the guest has its own place. None of these commands
    needs KVM.
    """


@image.command(
    short_help="What it is.", epilog=examples("kvmmig image info a.img", "kvmmig image info a.img --json")
)
@_path
@json_option
def info(path: str, as_json: bool) -> int:
    """Say what PATH is: which guest, when it was saved, how large it is.

    Its head, its tables and its state are checked, its memory is not: "kvmmig image verify" does that.
    """
    from kvmmig.cli.images import show_info

    return show_info(path, as_json=as_json)


@image.command(
    short_help="Whether it is whole.",
    epilog=examples(
        "kvmmig image verify a.img && kvmmig restore a.img",
        more="\b\nExit status:\n  0   all of it is whole\n  1   it is not, or can't be read",
    ),
)
@_path
def verify(path: str) -> int:
    """Read all of the image PATH, and check it against its digests.

    What is torn, truncated, edited or put together from two images is found, and each damaged block is named.
    """
    from kvmmig.cli.images import verify_image

    return verify_image(path)


@image.command(
    short_help="What differs between two.",
    epilog=examples(
        "kvmmig image diff before.img after.img",
        "kvmmig image diff before.img after.img --json",
        more="\b\nExit status:\n  0   the guests are the same\n  1   they differ, or one can't be read",
    ),
)
@click.argument("one", type=click.Path())
@click.argument("other", type=click.Path())
@json_option
def diff(one: str, other: str, as_json: bool) -> int:
    """List the runs of pages, and the state sections, in which the images ONE and OTHER differ."""
    from kvmmig.cli.images import show_difference

    return show_difference(one, other, as_json=as_json)


@image.command(
    short_help="For other tools: flat memory, or an ELF core.",
    epilog=examples("kvmmig image export a.img a.core", "kvmmig image export a.img a.raw --as flat"),
)
@_path
@click.argument("to", type=click.Path())
@click.option(
    "--as",
    "form",
    type=click.Choice(["core", "flat"]),
    default="core",
    help="core: an ELF core, with each vCPU as a thread, which gdb opens; flat: the memory, byte for byte, "
    "at its guest-physical address.  [default: core]",
)
def export(path: str, to: str, form: str) -> int:
    """Write the guest of the image PATH into the new file TO, for other tools.

    Addresses are guest-physical ones. The file is sparse where the guest's memory is zero.
    """
    from kvmmig.cli.images import export_image

    return export_image(path, to, form)


@image.command(
    short_help="From a stream to an image, or back.",
    epilog=examples(
        "kvmmig image convert saved-through-a-pipe.img a.img", "kvmmig image convert a.img a.stream"
    ),
)
@click.argument("source", type=click.Path(), metavar="FROM")
@click.argument("to", type=click.Path())
def convert(source: str, to: str) -> int:
    """Make an image TO of the stream FROM, or a stream of an image: whichever FROM is not.

    "kvmmig restore" takes both. A stream is what "--transport pipe" writes, and what a pipe carries; it must
    be read to its end before the guest runs, and an image need not be. A stream is held in memory meanwhile.
    """
    from kvmmig.cli.images import convert_image

    return convert_image(source, to)
