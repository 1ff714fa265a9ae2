"""How `make docs` builds the site: the Markdown pages as they stand in the repository, by Sphinx and MyST."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

import kvmmig

ROOT = Path(__file__).parents[1]
_URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
_LINK = re.compile(r"\]\((?![a-z]+:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_ANCHOR = re.compile(r'<a id="([^"]*)"></a>')

project = "kvmmig"
author = copyright = "The kvmmig developers"
version = release = kvmmig.__version__

# The pages' folder is the repository's root: so a link between two pages is the same one on the site, in a
# checkout and on GitHub.
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
include_patterns += [
    "docs/**.md",
    "bench/README.md",
    "tests/README.md",
    "tests/faults/README.md",
    "transports/README.md",
]
extensions = ["myst_parser"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
highlight_language = "none"
html_theme = "furo"
html_title = f"kvmmig {version}"
html_extra_path = ["site"]  # its front page leads to docs/index.html


def from_github(app: Sphinx, page: str, source: list[str]) -> None:
    """What GitHub understands, as MyST does: links to files that are no pages, and anchors in HTML."""
    folder = app.env.doc2path(page).parent

    def absolute(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if target.suffix == ".md" or not target.exists():
            return link[0]
        return f"]({_URLS['Homepage']}/blob/main/{target.relative_to(ROOT)}{link['anchor'] or ''})"

    source[0] = _ANCHOR.sub(r"[]{#\1}", _LINK.sub(absolute, source[0]))


def setup(app: Sphinx) -> None:
    app.connect("source-read", from_github)
