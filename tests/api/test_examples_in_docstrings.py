"""Every ``>>>`` in the docstring of a public name runs, and prints what it says.

They are written as one types them into ``python -m trio``, where ``await`` works at the prompt. Only what
they `print` is compared.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io

import pytest
import trio

import kvmmig

PATIENCE = 60.0  # seconds


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder()
    found = {}
    for name in kvmmig.__all__:
        for test in finder.find(getattr(kvmmig, name), name, module=False):
            if test.examples:
                found[test.name] = test
    return list(found.values())


EXAMPLES = examples()


def test_what_everybody_needs_first_has_an_example() -> None:
    wanted = {"open_machine", "migrate", "receive", "Monitor", "QMPClient"}
    assert wanted <= {test.name for test in EXAMPLES}


@pytest.mark.kvm
@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
async def test_the_example_prints_what_it_says(test: doctest.DocTest) -> None:
    names = {"kvmmig": kvmmig, "trio": trio}
    checker = doctest.OutputChecker()
    with trio.fail_after(PATIENCE):
        for example in test.examples:
            code = compile(example.source, f"<{test.name}>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                result = eval(code, names)
                if inspect.isawaitable(result):
                    await result
            got = printed.getvalue()
            assert checker.check_output(example.want, got, 0), f"{example.source}\nprinted {got!r}"
