"""The layout stays easy to search: small directories, described packages, distinct class names."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from tests.contract.documents import TOP

ROOTS = ("cortex", "neuron", "shared")
PACKAGES = sorted(path.parent for root in ROOTS for path in (TOP / root).rglob("__init__.py"))
MAX_ENTRIES = 15
MIN_DOCSTRING_WORDS = 8


def name_of(path: Path) -> str:
    return str(path.relative_to(TOP))


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_directories_stay_small(package: Path) -> None:
    """A directory has at most 15 modules and packages besides `__init__.py`, `__main__.py` and `py.typed`."""
    entries = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(entries - {"__init__.py", "__main__.py"}) <= MAX_ENTRIES, sorted(entries)


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_packages_are_described(package: Path) -> None:
    """The docstring of each package says what it holds and who may call it."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring.split()) >= MIN_DOCSTRING_WORDS, docstring


def test_public_classes_have_distinct_names() -> None:
    """A class name means one thing in cortex, neuron and shared."""
    places: dict[str, list[str]] = defaultdict(list)
    for root in ROOTS:
        for path in sorted((TOP / root).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name_of(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
