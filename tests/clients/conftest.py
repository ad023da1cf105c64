"""One fleet for all clients, whose engines load in a second, so that cold streams begin with comments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.clients.running import BROKEN, CHAT_ONLY, MODELS, SLOW, SLOW_LOAD_SECS, Bench, Outside, outside
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.clients import NodeEnvironment, node_clients, old_python_clients, python_clients
from tests.services import Fleet, running_fleet

Environment = TypeVar("Environment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder. The first one builds the clients, unless `make test` has."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("clients")
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """cortex and a neuron with simulated engines."""
    engine = ["--ttft-ms", "300", "--tokens-per-sec", "400"]
    neuron: dict[str, Any] = {
        "harnesses": [{"name": "sim"}],
        "harness": {"sim": {"extra_args": engine}},
        "simulate": {"devices": ["RTX 5090"]},
    }
    cortex = {
        "gateway": {"keepalive_secs": 0.1},
        "waiting": {"first_comment_secs": 0.1, "comment_interval_secs": 0.1},
        "poll": {"interval_secs": 0.2},
    }
    load_secs = {
        **dict.fromkeys((*MODELS, *CHAT_ONLY), 0.8),
        **dict.fromkeys(BROKEN.values(), 0.8),
        SLOW: SLOW_LOAD_SECS,
    }
    faults = {model: ["--fault", "unsupported-model"] for model in BROKEN.values()}
    faults[CHAT_ONLY[0]] = ["--fault", "chat-only"]
    faults[CHAT_ONLY[1]] = ["--fault", "chat-only-405", "--fault", "no-tokenize"]
    models = [
        {
            "id": model,
            "harness": "sim",
            "vram_mb": 4000,
            "tools": True,
            "args": ["--load-secs", f"{secs:g}", *faults.get(model, [])],
        }
        for model, secs in load_secs.items()
    ]
    with running_fleet(tmp_path_factory.mktemp("fleet"), neuron, cortex, {"models": models}) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def proxy() -> Iterator[Outside]:
    with outside() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bench(fleet: Fleet, proxy: Outside, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A new home for each module."""
    return Bench(fleet, tmp_path_factory.mktemp("home"), proxy)


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python of the current libraries."""
    return _available(python_clients)


@pytest.fixture(scope="session")
def old_python() -> Path:
    """The Python of the old libraries."""
    return _available(old_python_clients)


@pytest.fixture(scope="session")
def node() -> NodeEnvironment:
    return _available(node_clients)


def _available(build: Callable[[], Environment]) -> Environment:
    """Skips where the clients cannot be installed, and fails there in CI."""
    try:
        return build()
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the clients: {error}")
        pytest.skip(f"no clients here: {error}")
