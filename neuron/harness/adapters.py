"""How neuron gives a running engine LoRA adapters, and takes them away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True)
class EngineAccess:
    """Where neuron reaches an engine, and the secrets that the engine accepts. `api_key` None: it needs none."""

    url: str
    api_key: str | None = field(repr=False)
    control_key: str = field(repr=False)


class AdapterControl(ABC):
    """Talks to engines of one kind. An adapter has a name, under which clients request it."""

    @abstractmethod
    async def is_guarded(self, http: aiohttp.ClientSession, engine: EngineAccess) -> bool:
        """True if the engine loads adapters for neuron and for no other caller; False if it loads none.

        Raises:
            GuardFailed: it loads them for others too, so it must not serve.
        """

    @abstractmethod
    async def load(self, http: aiohttp.ClientSession, engine: EngineAccess, name: str, source: str) -> None:
        """Returns when requests for `name` are served with the adapter at `source`, a directory or a name on a hub.

        Raises:
            AdapterFailed: it cannot be loaded, or the engine did not answer.
        """

    @abstractmethod
    async def unload(self, http: aiohttp.ClientSession, engine: EngineAccess, name: str) -> None:
        """Returns when the engine accepts no requests for `name`; immediately if it has no such adapter. Running ones
        continue.

        Raises:
            AdapterFailed: the engine refused, or did not answer.
        """

    @abstractmethod
    async def present(self, http: aiohttp.ClientSession, engine: EngineAccess) -> frozenset[str]:
        """The adapters that the engine has.

        Raises:
            AdapterFailed: the engine did not answer.
        """

    @abstractmethod
    async def busy(self, http: aiohttp.ClientSession, engine: EngineAccess) -> frozenset[str]:
        """The adapters that have requests. Raises as `present`."""

    @abstractmethod
    def rank_of(self, config: Mapping[str, Any]) -> int | None:
        """The rank of an adapter, from its `CONFIG_FILE`; None if that does not say."""


CONFIG_FILE = "adapter_config.json"
"""In the directory of an adapter in PEFT's format."""
