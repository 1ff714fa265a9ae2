"""What a migration ended by, out of what nurseries have made of it."""

from __future__ import annotations

import trio


def alone(problem: BaseException) -> BaseException:
    """What failed, out of the group that a cancel at the same moment has put around it."""
    while isinstance(problem, ExceptionGroup) and len(problem.exceptions) == 1:
        problem = problem.exceptions[0]
    return problem


def only_cancelled(problem: BaseException) -> bool:
    """Nothing else than a cancel has ended it."""
    if isinstance(problem, BaseExceptionGroup):
        return all(only_cancelled(part) for part in problem.exceptions)
    return isinstance(problem, trio.Cancelled)
