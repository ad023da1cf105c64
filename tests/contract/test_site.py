"""The documents as a site: every link leads somewhere, every page is in the navigation, nothing comes from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.documents import TOP

LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"?(https?:)?//|<link\b[^>]*?\bhref=\"?(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=TOP,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_every_document_is_a_page(site: Path) -> None:
    """Those of docs/, and those at the top of the checkout."""
    for path in (TOP / "docs").rglob("*.md"):
        name = path.relative_to(TOP / "docs").with_suffix("")
        page = name.parent if name.name == "README" else name
        assert (site / page / "index.html").is_file(), path
    for title in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):
        assert (site / "project" / title / "index.html").is_file()


def test_pages_load_nothing_from_outside(site: Path) -> None:
    """Neither do their style sheets and pictures."""
    pages = sorted(site.rglob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8").replace('<link rel="canonical"', "")
        assert LOADED.search(text) is None, page
    for path in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"(?:url\(|@import |href=)[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_what_is_loaded_from_outside_is_found() -> None:
    assert LOADED.search('<script async src="https://cdn.example/x.js">')
    assert LOADED.search('<link rel="stylesheet" href="//fonts.example/css">')
    assert not LOADED.search('<script src="assets/x.js"></script><a href="https://example.org">')
