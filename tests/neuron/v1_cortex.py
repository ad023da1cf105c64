"""A cortex that speaks only protocol v1, such as helexa's: it uses six requests and the protocol's own fields, has no
engine keys, and takes a model that is listed as unloaded for one that its endpoint loads."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from tests.neuron.neurons import Answer, Client


@dataclass
class V1Cortex:
    """Routes as helexa's cortex does: loaded, then unloaded, then its catalogue. `base`: the neuron's URL."""

    session: aiohttp.ClientSession
    base: str

    async def call(self, method: str, path: str, body: Any = None) -> Answer:
        async with self.session.request(method, self.base + path, json=body) as response:
            return Answer(response.status, json.loads(await response.text()), response.headers)

    async def listed(self) -> dict[str, str]:
        """Status by model; one that it does not know counts as loaded."""
        return {entry["id"]: entry["status"] for entry in (await self.call("GET", "/models")).body}

    async def load(self, model: str, **changes: Any) -> Answer:
        spec = {"model_id": model, "harness": "candle", "quant": None, "tensor_parallel": None, "devices": [0]}
        return await self.call("POST", "/models/load", {**spec, **changes})

    async def unload(self, model: str) -> Answer:
        return await self.call("POST", "/models/unload", {"model_id": model})

    async def endpoint(self, model: str) -> Answer:
        return await self.call("GET", f"/models/{quote(model, safe='')}/endpoint")

    async def route(self, model: str) -> str:
        """The engine's URL; evicts the other models where the catalogue must place this one."""
        listed = await self.listed()
        if model not in listed or listed[model] == "loading":
            for other, status in listed.items():
                if status == "loaded":
                    assert (await self.unload(other)).status == 200
            answer = await self.load(model)
            assert answer.status == 200 or "already loaded" in json.dumps(answer.body), answer.body
        found = await self.endpoint(model)
        assert found.status == 200, found.body
        return str(found.body["url"])

    async def forward(self, model: str, *, stream: bool = False, to: str | None = None) -> str:
        """The answer to a chat of a client that has a key of this cortex's own."""
        url = to or await self.route(model)
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "stream": stream}
        headers = {"Authorization": "Bearer a client's key"}
        async with self.session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            text = await response.text()
            assert response.status == 200, text
        return text


@contextlib.asynccontextmanager
async def v1_cortex(neuron: Client) -> AsyncIterator[V1Cortex]:
    async with aiohttp.ClientSession() as session:
        yield V1Cortex(session, neuron.base)
