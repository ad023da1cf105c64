"""Documents name files, modules and headings that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.contract.documents import TOP

DOCUMENTS = sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")])
HISTORY = {"CHANGELOG.md"}
"""What an entry of the past names may be gone."""
FOLDERS = r"(?:cortex|neuron|shared|tests|benchmarks|deploy|docs)"
PATH = re.compile(rf"`({FOLDERS}/[\w./-]*)`")
DOTTED = re.compile(r"`((?:cortex|neuron|shared)(?:\.\w+)+)(?:\(\))?`")
FILE_NAMES = {"cortex.toml", "neuron.toml", "cortex.db"}
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(TOP))


def text_of(path: Path) -> str:
    """The document without its fenced blocks, which show what other programs write."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The ids that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(dotted: str) -> bool:
    """True when the name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    """Every relative link has its target, and every anchor its heading."""
    for link in LINK.findall(text_of(document)):
        if ":" in link:
            continue
        target, _, anchor = link.partition("#")
        path = document.parent / target if target else document
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in HISTORY], ids=name_of)
def test_named_files_exist(document: Path) -> None:
    """A path in code marks is a file or folder of the checkout."""
    for path in PATH.findall(text_of(document)):
        assert (TOP / path).exists(), path


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in HISTORY], ids=name_of)
def test_named_modules_exist(document: Path) -> None:
    """A dotted name in code marks is a module, a class or a function."""
    for dotted in DOTTED.findall(text_of(document)):
        assert dotted in FILE_NAMES or exists(dotted), dotted


def test_index_lists_every_document() -> None:
    """docs/README.md links each document of docs/ and the README links the index."""
    index = (TOP / "docs" / "README.md").read_text(encoding="utf-8")
    for path in (TOP / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index
    assert "(docs/README.md)" in (TOP / "README.md").read_text(encoding="utf-8")


def test_tests_of_the_compiled_modules_exist() -> None:
    """`make test-compiled` names them; a renamed file would fail only there, at the end of CI."""
    makefile = (TOP / "Makefile").read_text(encoding="utf-8")
    match = re.search(
        r"^COMPILED_TESTS := \$\(addprefix (\S+),(.*?)\\\n\s*\$\(addprefix (\S+),(.*?)\)\)$", makefile, re.M
    )
    assert match is not None
    below, directories, prefix, files = match.groups()
    named = [below + name for name in directories.split()] + [below + prefix + name for name in files.split()]
    assert [path for path in named if not (TOP / path).exists()] == []
