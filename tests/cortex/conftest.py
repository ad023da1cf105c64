"""A real cortex on a real socket, in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from cortex.accounts.keys.key_ring import KeyRing
from cortex.app import (
    build_control_app,
    build_metrics_app,
    control_address,
    control_socket,
    serving_here,
)
from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from cortex.control.wiring import Parts, running_control
from shared.serve import Site, bind, serving
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine
from tests.cortex.raw_http import RawClient, connected


@dataclass
class RunningCortex:
    """A cortex and a client for it."""

    url: str
    metrics_url: str
    parts: Parts
    http: aiohttp.ClientSession

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for changes of the fleet until the condition holds; the test's time-out is the deadline."""
        version = self.parts.fleet.version
        while not condition():
            version = await self.parts.fleet.changed_since(version)

    def chat(self, model: str, **fields: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
        data = io.BytesIO(json.dumps(body).encode())
        return self.http.post(
            f"{self.url}/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
        )


StartCortex = Callable[..., Awaitable[RunningCortex]]


def _entry(neuron: Any) -> dict[str, str]:
    """The neuron's entry in cortex.toml."""
    entry = {"name": neuron.name, "endpoint": neuron.url}
    token = getattr(neuron, "token", None)
    return entry if token is None else {**entry, "token": token}


@pytest.fixture
async def start_cortex() -> AsyncIterator[StartCortex]:
    """Starts cortexes; waits until each neuron that runs is healthy."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            neurons: Iterable[V1Neuron],
            models: list[dict[str, Any]],
            *,
            aliases: dict[str, Any] | None = None,
            wait_healthy: bool = True,
            host: str = "127.0.0.1",
            keys: str = "",
            **settings: Any,
        ) -> RunningCortex:
            entries = [_entry(neuron) for neuron in neurons]
            poll = {"interval_secs": 0.05, "timeout_secs": 0.5, **settings.pop("poll", {})}
            open_to = {"allow_anonymous": host != "127.0.0.1"}  # a peer on another host has no key
            gateway_settings = {"drain_timeout_secs": 0, **open_to, **settings.pop("gateway", {})}
            config = CortexConfig.model_validate(
                {"neurons": entries, "poll": poll, "gateway": gateway_settings, **settings}
            )
            catalogue = Catalogue.model_validate({"models": models, "aliases": aliases or {}})
            parts = await stack.enter_async_context(
                running_control(config, catalogue, keys=KeyRing(environ={"CORTEX_KEYS": keys}))
            )
            control, metrics = control_socket(), Site(build_metrics_app(parts), bind("127.0.0.1", 0))
            await stack.enter_async_context(
                serving([Site(build_control_app(parts), control), metrics], drain_timeout_secs=0)
            )
            gateway = bind(host, 0)
            port = gateway.getsockname()[1]
            await stack.enter_async_context(serving_here(parts, [gateway], control_address(control)))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            scheme = "http" if config.gateway.tls_files is None else "https"
            cortex = RunningCortex(f"{scheme}://{host}:{port}", f"http://127.0.0.1:{metrics.port}", parts, http)
            if wait_healthy:
                await cortex.until(lambda: len(parts.fleet.snapshot().healthy) == len(entries))
            return cortex

        yield start


@pytest.fixture
async def benjy() -> AsyncIterator[V1Neuron]:
    """A protocol v1 neuron with one 24 GB card."""
    async with V1Neuron("benjy", 24000).running() as neuron:
        yield neuron


@pytest.fixture
async def beast() -> AsyncIterator[V1Neuron]:
    """A protocol v1 neuron with two 32 GB cards."""
    async with V1Neuron("beast", 32000, 32000).running() as neuron:
        yield neuron


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[RawEngine]:
    """Benjy's engine, which has org/small loaded and answers with the bytes of the test's script."""
    async with RawEngine().running() as engine:
        benjy.models["org/small"] = "loaded"
        benjy.engine_url = engine.url
        yield engine


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron, engine: RawEngine) -> RunningCortex:
    """A cortex in front of `engine`. Many modules have one of their own."""
    return await start_cortex([benjy], [{"id": "org/small"}])


@pytest.fixture
async def client(cortex: RunningCortex) -> AsyncIterator[RawClient]:
    """A connection to `cortex`."""
    async with connected(cortex.url) as client:
        yield client
