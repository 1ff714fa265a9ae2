"""docs/api.md says what the docstrings say now."""

from __future__ import annotations

import re

import kvmmig
from tests.api.reference import PAGE, reference


def test_the_page_is_as_make_api_writes_it() -> None:
    assert PAGE.read_text() == reference(), 'say "make api" and commit docs/api.md'


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text()
    for name in kvmmig.__all__:
        assert name == "__version__" or f"`{name}`" in text


def test_the_contents_lead_somewhere() -> None:
    text = PAGE.read_text()
    headings = [
        re.sub(r"[^a-z0-9_ -]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    assert len(headings) == len(set(headings))
    there = {heading.replace(" ", "-") for heading in headings} | set(re.findall(r'<a id="(\w+)">', text))
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= there
