"""`GET /fleet/timeline`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

MODELS = [{"id": "a", "vram_mb": 20000}, {"id": "b", "vram_mb": 20000}]


async def timeline(cortex: RunningCortex, query: str = "") -> dict[str, Any]:
    async with cortex.http.get(f"{cortex.url}/fleet/timeline{query}") as response:
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


async def test_a_swap(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """It says what was loaded for whom, and what had to go for it."""
    cortex = await start_cortex([benjy], MODELS, poll={"interval_secs": 0.05})
    for model in ("a", "b"):
        benjy.used_mb = [20000]
        async with cortex.chat(model) as response:
            assert response.status == 200

    def open_spans() -> list[tuple[str, str]]:
        spans = cortex.parts.timeline.between(0, float("inf"))["spans"]
        return [(span.model, span.status) for span in spans if span.until is None]

    await until(lambda: open_spans() == [("b", "loaded")])
    spans = (await timeline(cortex))["spans"]
    (gone,) = [span for span in spans if span["model"] == "a" and span["status"] == "loaded"]
    assert gone["displaced_by"] == "b"
    assert gone["node"] == "benjy"
    assert gone["since"] <= gone["until"]


@pytest.mark.parametrize("query", ["?from=yesterday", "?to=nan", "?from=inf"])
async def test_odd_times(start_cortex: StartCortex, benjy: V1Neuron, query: str) -> None:
    cortex = await start_cortex([benjy], MODELS)
    async with cortex.http.get(f"{cortex.url}/fleet/timeline{query}") as response:
        assert response.status == 400
        assert "must be a Unix time" in (await response.json())["error"]["message"]


async def test_another_day(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    cortex = await start_cortex([benjy], MODELS)
    benjy.models = {"a": "loaded"}
    assert await timeline(cortex, "?from=5&to=6") == {"from": 5.0, "to": 6.0, "spans": [], "minutes": []}
