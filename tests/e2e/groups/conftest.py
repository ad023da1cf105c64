"""A cortex and two neurons in this process."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cortex.conftest import start_cortex
from tests.neuron.conftest import mark
from tests.neuron.neurons import Neuron, config_of, neuron_here

__all__ = ["mark", "start_cortex"]


@dataclass(frozen=True)
class Host:
    """A neuron as cortex.toml names it."""

    name: str
    neuron: Neuron

    @property
    def url(self) -> str:
        return self.neuron.base


@contextlib.asynccontextmanager
async def running_host(directory: Path, name: str, *, port: int = 0, **changes: Any) -> AsyncIterator[Host]:
    first = 28100 if name == "a" else 28500
    sim = {"port_range": [first, first + 399], "extra_args": ["--tokens-per-sec", "400"]}
    async with neuron_here(config_of(directory / name, name=name, sim=sim, **changes), port=port) as neuron:
        yield Host(name, neuron)


@pytest.fixture
async def hosts(mark: str, tmp_path: Path) -> AsyncIterator[list[Host]]:
    async with running_host(tmp_path, "a") as first, running_host(tmp_path, "b") as second:
        yield [first, second]
