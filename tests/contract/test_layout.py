"""The layout stays easy to search: small directories, described packages, distinct class names."""

from __future__ import annotations

import ast
import re
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


def docstring_of(package: Path) -> str:
    return ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""


def modules_below(name: str) -> list[Path]:
    """The module `a.b`, or every module of the package `a.b`."""
    path = TOP.joinpath(*name.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports(importer: str, imported: str) -> bool:
    """True if a module of `importer` imports a module of `imported`, both given as `a.b`."""
    for path in modules_below(importer):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                if any(f"{name}.".startswith(f"{imported}.") for name in names):
                    return True
    return False


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_packages_have_a_docstring(package: Path) -> None:
    """It has at least 8 words: a mere title does not say what belongs there."""
    assert len(docstring_of(package).split()) >= MIN_DOCSTRING_WORDS


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_packages_name_their_users_truly(package: Path) -> None:
    """Each module that a package's docstring names exists, and imports the package, is imported by it, or starts it as
    a process of its own."""
    own, docstring = name_of(package).replace("/", "."), docstring_of(package)
    for name in re.findall(r"`((?:cortex|neuron|shared)(?:\.\w+)+)`", docstring):
        assert all(path.exists() for path in modules_below(name)), name
        if f"as `python -m {own}`" not in docstring:
            assert imports(name, own) or imports(own, name), name


def test_public_classes_have_distinct_names() -> None:
    """A class name means one thing in cortex, neuron and shared."""
    places: dict[str, list[str]] = defaultdict(list)
    for root in ROOTS:
        for path in sorted((TOP / root).rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name_of(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
