"""`make docs` builds the site without a warning, and its links lead to the site or to the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", str(folder / "trees"), ".", str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not in a checkout: " + listed.stderr.strip())
    pages = [name for name in listed.stdout.split() if not name.startswith("examples/")]
    assert len(pages) >= 15
    assert [name for name in pages if not (site / name).with_suffix(".html").exists()] == []


def test_the_front_page_leads_to_the_first_one(site: Path) -> None:
    (target,) = set(re.findall(r'href="([^"]+)"', (site / "index.html").read_text()))
    assert (site / target).is_file()


def test_a_link_to_an_example_leads_to_the_repository(site: Path) -> None:
    links = re.findall(r'href="([^"#]*own_policy\.py)"', (site / "README.html").read_text())
    assert [link for link in links if not link.startswith("https://")] == []
    assert links
