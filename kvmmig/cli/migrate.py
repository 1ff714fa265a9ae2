"""``kvmmig migrate``, ``save`` and ``cancel``: another process's migration, begun, watched and ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import trio

from kvmmig.cli.display import Display, JsonLines, Lines, LiveBlock
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import echo
from kvmmig.cli.progress import summary
from kvmmig.cli.remote import end_machine, has_ended, machine, migration_figures
from kvmmig.cli.settings import commands_for
from kvmmig.cli.statuses import WrongCommandLine
from kvmmig.cli.storing import check_makes_sense
from kvmmig.cli.streams import Copying, is_pipe
from kvmmig.cli.terminal import one_key
from kvmmig.errors import BadURI, ChannelBroken, MigrationError
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.qmp.client import QMPClient
from kvmmig.qmp.messages import QMPError
from kvmmig.transport import TransportURI, descriptors

_EVERY = 0.1  # seconds between two looks
_FAILED, _LEFT_RUNNING, _INTERRUPTED = 1, 3, 130
_QUESTION = "Cancel the migration? (y: cancel, n: leave it running, any other key: watch on) "
_KEY = 64  # bytes: what one key sends, and not the next question's answer


def migrate_machine(
    name: str,
    uri: TransportURI,
    settings: Sequence[tuple[str, str]] = (),
    *,
    keep: bool,
    detach: bool,
    as_json: bool,
    record: str | None = None,
    then: str = "",
    live: bool = True,
    stream: int | None = None,
    keep_running: bool = False,
) -> int:
    """Migrate a machine's guest, and show it; ``then`` is what can be done when it has moved.

    ``settings`` are set first, as ``kvmmig set`` does it.

    Unless it is ``live`` the guest stands still from the beginning. With ``keep_running`` it is only saved,
    and goes on in its machine. A ``stream`` is a descriptor to write it to, in the place of what ``uri``
    says; it is taken over. ``record`` is a file that its migrations are recorded to from here on, an absolute
    path.

    Returns the exit status. Raises `KvmmigError`.
    """

    text = _sayable(uri)
    commands = commands_for(settings)
    copying = None
    if stream is None:
        number = _descriptor(uri)
    elif is_pipe(stream):
        number = stream
    else:
        reading, number = os.pipe2(os.O_CLOEXEC)
        copying = Copying(reading, stream)

    async def command() -> int:
        async with machine(name) as client:
            if commands:  # which must not change another one that runs
                await _check_none_runs(client, name)
            for command, arguments in commands:
                await client.execute(command, arguments)
            if record is not None:
                await client.execute("migrate-set-parameters", {"x-kvmmig-record": record})
            said = text if number is None else await _pass(client, uri, number)
            order: dict[str, object] = {"uri": said}
            if not live:
                order["x-kvmmig-live"] = False
            if keep_running:
                order["x-kvmmig-keep-running"] = True
            if detach:
                await _begin(client, name, uri, order)
                _say(f"the guest of {name!r} is being migrated; watch it with: kvmmig status {name} --watch")
                return 0
            watch = _Watch(client, name, JsonLines() if as_json else LiveBlock(text) if _live() else Lines())
            try:
                # From here on a Ctrl-C is about the migration, which may have begun before the reply is here.
                with trio.open_signal_receiver(signal.SIGINT) as signals:
                    await _begin(client, name, uri, order)
                    if number is not None:  # else this command would keep a pipe open whose reader waits
                        descriptors.let_go(number)
                    figures = await watch.until_end(signals)
                if figures is None:
                    _say(f"it goes on without you; watch it with: kvmmig status {name} --watch")
                    return _LEFT_RUNNING
                if copying is not None and figures.phase is Phase.DONE:
                    await _written(client, name, copying)
                status = await _report_end(
                    client,
                    name,
                    figures,
                    watch.interrupted,
                    end=not keep,
                    keep_running=keep_running,
                    quiet=as_json,
                )
            except* ChannelBroken as errors:
                raise MigrationError(f"the machine {name!r} has ended before its guest had moved") from errors
            if not status and then:
                _say(then)
            return status

    return run_to_end(command)


def cancel_migration(name: str) -> int:
    """Cancel the migration that runs, and wait for its end. Raises `KvmmigError` where there is none."""

    async def command() -> int:
        async with machine(name) as client:
            figures, _ = await migration_figures(client)
            if figures is None or has_ended(figures):
                raise MigrationError(f"no migration of {name!r} is running, so there is nothing to cancel")
            await client.execute("migrate_cancel")
            while figures is not None and not has_ended(figures):
                await trio.sleep(_EVERY / 5)
                figures, _ = await migration_figures(client)
            if figures is not None and figures.phase is Phase.DONE:
                raise MigrationError(f"it was too late to cancel: the guest of {name!r} has moved")
        return 0

    return run_to_end(command)


class _Watch:
    """Looks at a migration until its end, and asks what Ctrl-C is to mean."""

    def __init__(self, client: QMPClient, name: str, display: Display) -> None:
        self._client = client
        self._name = name
        self._display = display
        #: Somebody pressed Ctrl-C and wanted it cancelled.
        self.interrupted = False

    async def until_end(self, signals: AsyncIterator[int]) -> MigrationStatistics | None:
        """The last figures; None when it was left running. ``signals`` are the Ctrl-Cs."""
        figures: MigrationStatistics | None = None
        with self._display:
            async with trio.open_nursery() as nursery:

                async def look() -> None:
                    nonlocal figures
                    while True:
                        seen, raw = await migration_figures(self._client)
                        assert seen is not None
                        self._display.show(seen, raw)
                        if has_ended(seen):
                            figures = seen
                            nursery.cancel_scope.cancel()
                            return
                        await trio.sleep(_EVERY)

                nursery.start_soon(look)
                await self._interrupted(signals)
                nursery.cancel_scope.cancel()
        return figures

    async def _interrupted(self, signals: AsyncIterator[int]) -> None:
        """Returns when it is to be left running; else has it cancelled, and goes on."""
        ask = _can_ask()
        async with trio.open_nursery() as nursery:
            async for _ in signals:
                if self.interrupted:  # and still no end: the monitor itself is stuck
                    break
                if ask:
                    with self._display.hidden():
                        answer = await self._ask(signals)
                    if answer == "leave":
                        break
                    if answer == "go on":
                        continue
                self.interrupted = True
                nursery.start_soon(self._cancel)
            nursery.cancel_scope.cancel()

    async def _cancel(self) -> None:
        try:
            await self._client.execute("migrate_cancel")
        except QMPError as error:  # it is too late
            with self._display.hidden():
                _say(str(error))

    async def _ask(self, signals: AsyncIterator[int]) -> str:
        """``cancel``, ``leave`` or ``go on``; a second Ctrl-C, or the end of the input, cancels."""
        answer = "cancel"
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                nonlocal answer
                # Not in a thread: whoever is cancelled must not leave one behind that reads the shell's keys.
                await trio.lowlevel.wait_readable(0)
                answer = _meaning(os.read(0, _KEY).decode(errors="replace"))
                nursery.cancel_scope.cancel()

            with one_key(0):
                sys.stderr.write("\r\n" + _QUESTION)
                sys.stderr.flush()
                nursery.start_soon(read)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
        sys.stderr.write(f"{answer}\n")
        return answer


def _meaning(typed: str) -> str:
    word = typed.strip().lower()
    if not typed or word.startswith(("y", "c")):
        return "cancel"
    return "leave" if word.startswith(("n", "l")) else "go on"


async def _begin(client: QMPClient, name: str, uri: TransportURI, order: Mapping[str, object]) -> None:
    """Raises `WrongCommandLine` for a URI that nobody understands, also while another migration runs."""
    try:
        await client.execute("migrate", order)
    except QMPError:
        running = await _running(client, name)
        try:
            check_makes_sense(uri, all_known=True)
        except WrongCommandLine as error:
            raise WrongCommandLine("; besides, ".join([str(error), *running])) from error
        if running:
            raise MigrationError(running[0]) from None
        raise


async def _check_none_runs(client: QMPClient, name: str) -> None:
    for running in await _running(client, name):
        raise MigrationError(running)


async def _running(client: QMPClient, name: str) -> list[str]:
    """The sentence that one runs already, with what can be done; none where none does."""
    figures, _ = await migration_figures(client)
    if figures is None or has_ended(figures):
        return []
    return [
        f"the guest of {name!r} is already on its way to {figures.peer or 'another place'}; to watch it: "
        f"kvmmig status {name} --watch; to end it: kvmmig cancel {name}"
    ]


async def _report_end(
    client: QMPClient,
    name: str,
    figures: MigrationStatistics,
    interrupted: bool,
    *,
    end: bool,
    keep_running: bool,
    quiet: bool,
) -> int:
    match figures.phase:
        case Phase.DONE:
            if not quiet:
                echo(summary(figures, verb="been saved" if keep_running else "moved"))
            if keep_running:
                _say(f"the guest of {name!r} goes on here")
            elif not end:
                _say(f"{name!r} stays here, stopped, until: kvmmig quit {name}")
            else:
                await end_machine(client, name)
                _say(f"{name!r} has been ended here")
            return 0
        case Phase.UNKNOWN:
            _say(figures.error)
            _say(f"if it does not run there: kvmmig resume {name} --force; if it does: kvmmig quit {name}")
            return _FAILED
        case _:
            _say(figures.error)
            status = await client.execute("query-status")
            _say(f"the guest of {name!r} is here as before: {status['status']}")
            return _INTERRUPTED if interrupted and figures.phase is Phase.CANCELLED else _FAILED


def _descriptor(uri: TransportURI) -> int | None:
    """The descriptor of this command that the guest is to go to, if it is one. Raises `BadURI`."""
    if uri.scheme != "fd":
        return None
    number = descriptors.number_of(uri.target)
    if number is None:
        raise BadURI(
            f"fd:{uri.target}: a name means something to a monitor's client that has passed a descriptor by "
            "it; here, write the number of one that this command was started with, such as fd:5"
        )
    descriptors.check_inherited(number)
    return number


async def _written(client: QMPClient, name: str, copying: Copying) -> None:
    """Wait until all is written. Where that fails, the guest goes on in its machine, which is still here."""
    await trio.to_thread.run_sync(copying.wait, abandon_on_cancel=True)
    if copying.error is not None:
        await client.execute("x-kvmmig-take-back")
        raise MigrationError(
            f"it can't be written: {copying.error.strerror}; the guest of {name!r} goes on where it was"
        ) from copying.error


async def _pass(client: QMPClient, uri: TransportURI, number: int) -> str:
    """Pass the machine this command's descriptor; the URI that names it there."""
    name = f"descriptor-{number}"
    await client.execute("getfd", {"fdname": name}, fds=[number])
    return str(replace(uri, target=name))


def _sayable(uri: TransportURI) -> str:
    text = str(uri)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadURI(
            f"{text!r}: that is no UTF-8, and a monitor takes no other text; have a name that is"
        ) from error
    return text


def _live() -> bool:
    return os.isatty(1) and os.environ.get("TERM", "dumb") != "dumb"


def _can_ask() -> bool:
    return os.isatty(0) and os.isatty(2)


def _say(text: str) -> None:
    echo(f"kvmmig: {text}", err=True)
