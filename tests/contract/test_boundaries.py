"""What may import what, and how large a module may get."""

from __future__ import annotations

import ast
import gc
import re
from pathlib import Path
from types import ModuleType

import pytest

import cortex
import neuron
import shared
from tests.contract.documents import TOP

PACKAGES = {"cortex": {"neuron"}, "neuron": {"cortex"}, "shared": {"cortex", "neuron"}}
SOURCES = {package: sorted((TOP / package).rglob("*.py")) for package in PACKAGES}
ALL_SOURCES = [path for paths in SOURCES.values() for path in paths]
PURE_LIBRARIES = {"__future__", "collections", "enum", "functools", "itertools", "math", "typing"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
_DECLARED = re.compile(r"\bPure\b|\bNo I/O\b")


def _parsed(text: str) -> ast.Module:
    """Parses without garbage collection, which can raise SystemError here in CPython 3.11."""
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        gc.enable()


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, at any level of nesting."""
    names: set[str] = set()
    for node in ast.walk(_parsed(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module.partition(".")[0])
    return names


def called(path: Path) -> set[str]:
    """The last part of the name of each function that a module calls."""
    functions = [
        node.func for node in ast.walk(_parsed(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    attributes = {function.attr for function in functions if isinstance(function, ast.Attribute)}
    return attributes | {function.id for function in functions if isinstance(function, ast.Name)}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_each_other(package: str) -> None:
    """cortex and neuron import shared, never each other, and none imports the tests."""
    assert SOURCES[package]
    for path in SOURCES[package]:
        assert imported(path).isdisjoint(PACKAGES[package] | {"tests"}), path


def test_cortex_imports_nothing_by_a_string() -> None:
    """`cortex dev` starts neurons as processes; a dynamic import could reach neuron without the check above."""
    for path in SOURCES["cortex"]:
        assert called(path).isdisjoint({"import_module", "__import__", "run_module", "run_path", "exec", "eval"}), path


def declared_pure() -> list[Path]:
    """The modules whose docstring says "Pure" (values in, values out) or "No I/O" (they also keep state), and all
    modules of a package whose docstring says so."""
    found: set[Path] = set()
    for path in ALL_SOURCES:
        text = ast.get_docstring(_parsed(path.read_text(encoding="utf-8"))) or ""
        if _DECLARED.search(text):
            found.update(path.parent.rglob("*.py") if path.name == "__init__.py" else [path])
    return sorted(found)


PURE = declared_pure()


def test_the_planner_and_the_route_decision_are_declared_pure() -> None:
    """The list of pure modules is read from docstrings; these must not drop out of it."""
    names = {str(path.relative_to(TOP)) for path in PURE}
    assert {"cortex/placement/planner.py", "cortex/control/decision.py", "neuron/memory/selection.py"} <= names
    assert len(names) > 80


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(TOP)))
def test_decisions_are_pure(path: Path) -> None:
    """A module that says it is pure uses no event loop, socket, process, clock, logger or file."""
    forbidden = {"aiohttp", "asyncio", "socket", "subprocess", "threading", "time", "os", "logging"}
    assert imported(path).isdisjoint(forbidden)
    assert called(path).isdisjoint({"open", "read_text", "read_bytes", "write_text", "write_bytes", "print"})


def test_wire_models_import_no_server() -> None:
    """The protocol can be used without a server."""
    for path in (TOP / "shared" / "protocol").glob("*.py"):
        assert imported(path) <= {*PURE_LIBRARIES, "pydantic", "shared"}, path


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    """A module has at most 400 lines, a function 60."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("module", [cortex, neuron, shared], ids=lambda module: module.__name__)
def test_packages_are_ours(module: ModuleType) -> None:
    """`shared` is a common name: make sure it is this project's package."""
    assert module.__file__ is not None
    assert Path(module.__file__) == TOP / module.__name__ / "__init__.py"


def test_readme_is_short() -> None:
    """The README has fewer than 150 lines; the rest is in docs/."""
    assert len((TOP / "README.md").read_text(encoding="utf-8").splitlines()) < 150
