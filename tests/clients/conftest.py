"""The fleet, and the clients' environments: skipped where they cannot be had, but never in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.fleet import ClientFleet, running_fleet
from tests.clients.programs import NodeClients, PythonClients, client_environment
from tests.environment.cache import EnvironmentUnavailable
from tests.environment.clients import node_clients, python_clients


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("clients")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientFleet]:
    with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def python(tmp_path: Path) -> PythonClients:
    return PythonClients(_had(python_clients), client_environment(tmp_path))


@pytest.fixture
def node(tmp_path: Path) -> NodeClients:
    return NodeClients(_had(node_clients), client_environment(tmp_path))


def _had(build: Callable[[], Path]) -> Path:
    try:
        return build()
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the real clients: {error}")
        pytest.skip(f"no real clients here: {error}")
