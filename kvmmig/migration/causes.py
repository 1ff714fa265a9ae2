"""What a migration ended by: out of what nurseries have made of it, and as a person is told."""

from __future__ import annotations

import logging

import trio

from kvmmig.errors import ChannelBroken, KvmmigError, MigrationCancelled, MigrationError, OutcomeUnknown
from kvmmig.migration.phases import PHASES, Phase

_log = logging.getLogger(__name__)


def alone(problem: BaseException) -> BaseException:
    """What failed, out of the group that a cancel at the same moment has put around it."""
    while isinstance(problem, ExceptionGroup) and len(problem.exceptions) == 1:
        problem = problem.exceptions[0]
    return problem


def was_cancelled(problem: BaseException) -> bool:
    """Somebody asked for it, or a cancel from outside, and nothing else, has ended it."""
    if isinstance(problem, BaseExceptionGroup):
        return all(was_cancelled(part) for part in problem.exceptions)
    return isinstance(problem, trio.Cancelled | MigrationCancelled)


def as_error(problem: BaseException, phase: Phase, to: str, *, may_have_stored: bool) -> BaseException:
    """What to raise for a problem in this phase of a migration ``to`` there: itself, or what explains it.

    A transport that broke its contract at the end of a save ``may_have_stored`` the guest.
    """
    error = problem
    if isinstance(problem, Exception) and not isinstance(problem, KvmmigError):
        _log.error("the migration to %s failed by a bug of kvmmig", to, exc_info=problem)
        error = MigrationError(f"the migration failed by a bug of kvmmig: {problem!r}")
    if PHASES[phase].on_error is Phase.UNKNOWN and isinstance(error, Exception):
        return OutcomeUnknown(
            f'the guest was handed over ("go" was sent to {to}), but nobody said that it runs there: {error}'
            ". Look there first; it is stopped here and does not start again by itself"
        )
    if may_have_stored:
        return ChannelBroken(
            f"{error}; it may have stored the guest all the same, and that copy must not be started: the "
            "guest goes on here"
        )
    return error
