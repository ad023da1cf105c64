"""Why a model failed stands wherever an operator looks."""

from __future__ import annotations

import asyncio
from typing import Any

from cortex.cli.tables import explain_table, models_table
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

MODEL = "org/m"
WHY = "ValueError: no such architecture"


async def got(cortex: RunningCortex, path: str) -> Any:
    async with cortex.http.get(f"{cortex.url}{path}") as response:
        assert response.status == 200
        return await response.json()


async def test_the_reason_of_a_failed_model_is_shown(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
) -> None:
    """In the list of models and in the explanation, without the engine's output; of engines that work there is none."""
    for neuron, status in ((benjy, "failed"), (beast, "loaded")):
        neuron.models[MODEL] = status
    benjy.entries[MODEL] = {"error": f"{WHY}\nlast output lines:\nTraceback", "reason": "gave up"}
    cortex = await start_cortex([benjy, beast], [{"id": MODEL}])
    listed, explained = await asyncio.gather(got(cortex, "/v1/models"), got(cortex, f"/fleet/explain?model={MODEL}"))
    locations = {each["node"]: each for each in listed["data"][0]["locations"]}
    assert locations["benjy"]["reason"] == WHY
    assert "reason" not in locations["beast"]
    assert {each["node"]: each["instances"][0]["error"] for each in explained["nodes"]} == {"benjy": WHY, "beast": None}
    assert f"benjy (failed: {WHY})" in models_table(listed)
    assert f"\n  failed on benjy: {WHY}\n" in explain_table(explained)
