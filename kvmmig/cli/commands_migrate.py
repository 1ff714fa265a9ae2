"""``migrate``, ``save`` and ``cancel``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import click

from kvmmig.cli.arguments import (
    StoringOption,
    examples,
    json_option,
    machine_argument,
    machines_argument,
    record_option,
    secret_file_option,
)
from kvmmig.cli.completion import URI, SettingValue
from kvmmig.cli.secretfile import with_secret

if TYPE_CHECKING:
    from kvmmig.transport.uri import TransportURI

Settings: TypeAlias = list[tuple[str, str]]

_STATUSES = """\b
Exit status:
  0          the guest has moved; with --detach: it has begun to
  1          it has not, and goes on where it was
  2          a command line that makes no sense
  3          it goes on in the background, as was asked for at Ctrl-C
  130        Ctrl-C has cancelled it, and the guest goes on where it was
  129, 143   SIGHUP or SIGTERM ended this command, and it goes on"""

_keep_option = click.option(
    "--keep",
    is_flag=True,
    help="Leave the machine here when its guest has moved: stopped, for those who want its figures.",
)
_detach_option = click.option(
    "-d", "--detach", is_flag=True, help='Return at once; "kvmmig status NAME --watch" shows how it goes on.'
)


def _limits_options(command: Callable[..., int]) -> Callable[..., int]:
    """What may be set along with it: for this migration, and for later ones of that machine."""
    for setting in ("timeout", "downtime-limit", "bandwidth"):
        option = click.option(
            f"--{setting.removesuffix('-limit')}",
            setting.replace("-", "_"),
            type=SettingValue(setting),
            metavar={"bandwidth": "RATE"}.get(setting, "DURATION"),
            help=_LIMITS[setting],
        )
        command = option(command)
    return command


_LIMITS = {
    "bandwidth": "First set NAME bandwidth RATE: send at most so much, such as 500MB/s; or none.",
    "downtime-limit": "First set NAME downtime-limit DURATION: stop the guest for at most so long, such as "
    "50ms.",
    "timeout": "First set NAME timeout DURATION: cancel it when it takes longer, such as 2min; or none. "
    '"kvmmig set NAME on-timeout force" has it finished instead.',
}


@click.command(
    short_help="Move a machine's guest while it runs.",
    epilog=examples(
        "kvmmig migrate a tcp:192.0.2.7:4444",
        "kvmmig migrate a unix:/run/user/1000/b.migration --keep",
        "kvmmig migrate a 'throttle+tcp:127.0.0.1:4444?throttle.rate=100MB/s'",
        "kvmmig migrate a tcp:192.0.2.7:4444 --bandwidth 500MB/s --timeout 2min",
        "kvmmig migrate a tcp:192.0.2.7:4444 --record a.jsonl",
        "kvmmig migrate a tcp:192.0.2.7:4444 --json | tee figures",
        more=_STATUSES,
    ),
)
@machine_argument
@click.argument("uri", type=URI())
@secret_file_option
@_limits_options
@_keep_option
@_detach_option
@record_option
@json_option
def migrate(
    name: str,
    uri: str,
    secret_file: str | None,
    keep: bool,
    detach: bool,
    record: str | None,
    as_json: bool,
    **limits: str | None,
) -> int:
    """Move the guest of the machine NAME to URI while it runs; "kvmmig transports" lists the ways.

    When it has moved, the machine here is ended. Ctrl-C asks whether to cancel or to leave it running.
    """
    from kvmmig.cli.storing import checked
    from kvmmig.transport.uri import TransportURI

    to = with_secret(checked(TransportURI.parse(uri)), secret_file)
    return _migrate(name, to, _given(limits), keep=keep, detach=detach, record=record, as_json=as_json)


@click.command(
    short_help="Save a machine's guest to a file.",
    epilog=examples(
        "kvmmig save a /var/tmp/a.img",
        "kvmmig save a /var/tmp/a.img --keep-running",
        "kvmmig save a a.img --transport pipe",
        "kvmmig save a a.img --stopped",
        more=_STATUSES,
    ),
)
@machine_argument
@click.argument("path", type=click.Path())
@click.option(
    "--transport",
    cls=StoringOption,
    help="What writes it: the machine itself (file), a helper at the end of a pipe (pipe), or another "
    "transport that stores.",
)
@_limits_options
@click.option(
    "--stopped",
    is_flag=True,
    help="The guest stands still from the beginning: the smallest file, and the soonest.",
)
@click.option(
    "--keep-running", is_flag=True, help="Let the guest go on here as well, from the moment that was saved."
)
@_keep_option
@_detach_option
@record_option
@json_option
def save(
    name: str,
    path: str,
    transport: str,
    stopped: bool,
    keep_running: bool,
    keep: bool,
    detach: bool,
    record: str | None,
    as_json: bool,
    **limits: str | None,
) -> int:
    """Save the guest of the machine NAME to PATH while it runs; "kvmmig restore" goes on with it.

    - is standard output, also of a pipe; what is said goes to standard error then.

    A guest that writes fast is stopped after a few rounds: what was asked for is a file, and soon.

    A file appears there when it is whole and on disk; until then an older one stays. When it has been
    saved, the machine is ended. Ctrl-C asks whether to cancel or to leave it running.
    """
    import shlex

    if keep and keep_running:
        raise click.UsageError("--keep leaves the guest here stopped, so --keep-running can't go with it")
    from kvmmig.cli.storing import checked, storing_uri
    from kvmmig.transport.uri import TransportURI

    with_transport = "" if transport in ("file", "pipe") else f" --transport {transport}"
    then = f"go on with it: kvmmig restore {shlex.quote(path)}{with_transport}"
    if path == "-" or transport in ("file", "pipe"):
        from kvmmig.cli.streams import own_descriptor

        stream = own_descriptor(path, writing=True)
        if stream is not None:
            if keep_running:
                raise click.UsageError("to a stream a guest is moved, so --keep-running can't go with it")
            _check_stream(path, transport, detach=detach)
            return _migrate(
                name,
                TransportURI("fd", "stream"),
                _given(limits),
                stream=stream,
                live=not stopped,
                keep=keep,
                detach=False,
                record=record,
                as_json=as_json,
            )
    uri = checked(storing_uri(transport, path))
    return _migrate(
        name,
        uri,
        _given(limits),
        live=not stopped,
        keep=keep,
        detach=detach,
        record=record,
        as_json=as_json,
        then=then,
        keep_running=keep_running,
    )


def _check_stream(path: str, transport: str, *, detach: bool) -> None:
    if transport != "file":
        raise click.UsageError(
            f"--transport {transport} writes to a file of its own, so {path} can't go with it"
        )
    if detach:
        raise click.UsageError(f"to {path} this command itself writes, so --detach can't go with it")


@click.command(short_help="Cancel machines' migrations.", epilog=examples("kvmmig cancel a"))
@machines_argument
def cancel(names: tuple[str, ...]) -> int:
    """Cancel the migration of the machine NAME; its guest goes on where it is. Returns when that is so."""
    from kvmmig.cli.migrate import cancel_migration
    from kvmmig.cli.remote import for_each

    return for_each(names, cancel_migration)


def _given(limits: Mapping[str, str | None]) -> Settings:
    return [(name.replace("_", "-"), value) for name, value in limits.items() if value is not None]


def _migrate(
    name: str,
    uri: TransportURI,
    settings: Settings,
    *,
    keep: bool,
    detach: bool,
    record: str | None,
    as_json: bool,
    live: bool = True,
    then: str = "",
    keep_running: bool = False,
    stream: int | None = None,
) -> int:
    if keep and detach:
        raise click.UsageError("--detach leaves the machine here anyway, so --keep can't go with it")
    from kvmmig.cli.migrate import migrate_machine

    return migrate_machine(
        name,
        uri,
        settings,
        live=live,
        keep=keep,
        detach=detach,
        record=record,
        as_json=as_json,
        then=then,
        keep_running=keep_running,
        stream=stream,
    )
