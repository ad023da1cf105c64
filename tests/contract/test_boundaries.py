"""What may import what, and how large a module may get."""

from __future__ import annotations

import ast
import gc
import sys
from pathlib import Path

import pytest

import cortex
import neuron
import shared
from tests.contract.documents import TOP

PACKAGES = {"cortex": {"neuron"}, "neuron": {"cortex"}, "shared": {"cortex", "neuron"}}
SOURCES = {package: sorted((TOP / package).rglob("*.py")) for package in PACKAGES}
ALL_SOURCES = [path for paths in SOURCES.values() for path in paths]
PURE = (
    "cortex/api/model_shapes.py",
    "cortex/config/catalogue.py",
    *(f"cortex/control/{name}.py" for name in ("explain", "routing")),
    *(f"cortex/fleet/{name}.py" for name in ("snapshot", "sse_reader")),
    *(
        f"cortex/http/{name}.py"
        for name in ("body_reader", "decompress", "framing", "headers", "heads", "request", "responses")
    ),
    "cortex/metrics/counters.py",
    *(
        f"cortex/placement/{name}.py"
        for name in (
            *("candidates", "capacity", "devices", "eviction", "fair_queue", "feasibility"),
            *("inputs", "planner", "refusal", "replicas"),
        )
    ),
    *(
        f"cortex/proxy/{name}.py"
        for name in ("authentication", "body/json_scan", "body/model_field", "cross_site", "error_event", "paths")
    ),
    *(f"cortex/proxy/balancing/{name}.py" for name in ("affinity", "choice", "speeds")),
    *(f"cortex/simulator/{name}.py" for name in ("engine", "fleet_file", "outcome", "policies", "trace", "workload")),
    *(f"cortex/upstream/{name}.py" for name in ("replica", "usage")),
    *(
        f"neuron/estimate/files/{name}.py"
        for name in ("architecture", "experts", "fields", "layers", "number_types", "parameters")
    ),
    *(f"neuron/estimate/{name}.py" for name in ("options", "reply", "result", "weights")),
    "neuron/gpu/links.py",
    *(f"neuron/harness/{name}.py" for name in ("activity", "base", "checks", "environment")),
    *(
        f"neuron/harness/vllm/{name}.py"
        for name in ("activity", "argument_policy", "command", "errors", "memory_flags", "phases")
    ),
    *(
        f"neuron/harness/vllm/estimate/{name}.py"
        for name in ("context_length", "estimator", "kv_cache", "overhead", "parallel")
    ),
    "neuron/lifecycle/restart_backoff.py",
    "neuron/lifecycle/states.py",
    *(f"neuron/memory/{name}.py" for name in ("capacity", "interconnect", "requirement", "selection")),
    *(f"neuron/progress/{name}.py" for name in ("eta", "load_times", "phases", "progress")),
    "neuron/spec.py",
    "shared/errors.py",
    "shared/gpus.py",
    "shared/retry_after.py",
)
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


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


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_each_other(package: str) -> None:
    """cortex -> shared <- neuron, and none imports the tests."""
    assert SOURCES[package]
    for path in SOURCES[package]:
        assert imported(path).isdisjoint(PACKAGES[package] | {"tests"}), path


def test_neurons_processes_are_started_by_name_only() -> None:
    """cortex dev starts neurons as a user would; cortex does not import neuron through a string either."""
    for path in SOURCES["cortex"]:
        assert "import_module" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("name", PURE)
def test_decisions_are_pure(name: str) -> None:
    """Decisions depend on their arguments only: no event loop, socket, process or clock."""
    forbidden = {"aiohttp", "asyncio", "socket", "subprocess", "threading", "time", "os", "logging"}
    assert imported(TOP / name).isdisjoint(forbidden), name


def test_wire_models_import_no_server() -> None:
    """The protocol can be used without a server."""
    for path in (TOP / "shared" / "protocol").glob("*.py"):
        assert imported(path) <= {"__future__", "typing", "enum", "collections", "math", "pydantic", "shared"}, path


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_modules_and_functions_stay_small(path: Path) -> None:
    """400 lines a module, 60 a function."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("module", [cortex, neuron, shared], ids=lambda module: module.__name__)
def test_packages_are_ours(module: object) -> None:
    """`shared` is a common name: make sure it is this project's package."""
    name = getattr(module, "__name__", "")
    file = Path(str(getattr(module, "__file__", "")))
    assert file == TOP / name / "__init__.py"
    assert name in sys.modules


def test_readme_is_short() -> None:
    """Under 150 lines; the rest is in docs/."""
    assert len((TOP / "README.md").read_text(encoding="utf-8").splitlines()) < 150
