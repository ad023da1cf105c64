"""`GET /v1/models`: what clients are told they may ask for."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import openai
import pytest

from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.neuron.neurons import until

SMALL = {"id": "org/small", "vram_mb": 4000}
LARGE = {
    "id": "org/large",
    "vram_mb": 54000,
    "min_devices": 2,
    "min_device_vram_mb": 30000,
    "pinned_on": ["beast"],
    "quant": "fp8",
    "limit": {"context": 32768, "output": 4096},
}
HUGE = {"id": "org/huge", "min_devices": 8}


async def listed(cortex: RunningCortex) -> dict[str, dict[str, Any]]:
    """The list by id."""
    async with cortex.http.get(f"{cortex.url}/v1/models") as response:
        assert response.status == 200
        body = await response.json()
    assert body["object"] == "list"
    entries = {entry["id"]: entry for entry in body["data"]}
    assert len(entries) == len(body["data"])
    return entries


async def test_catalogue_models_that_some_topology_can_hold(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """Each with the neurons that can hold it. A model that none can ever hold is not listed."""
    cortex = await start_cortex([beast, benjy], [SMALL, LARGE, HUGE])
    entries = await listed(cortex)
    assert set(entries) == {"org/small", "org/large"}
    assert entries["org/small"]["feasible_on"] == ["beast", "benjy"]
    large = entries["org/large"]
    assert large["feasible_on"] == ["beast"]
    assert (large["object"], large["owned_by"], large["loaded"], large["locations"]) == ("model", "cortex", False, [])
    assert abs(large["created"] - time.time()) < 60
    assert (large["limit"], large["max_model_len"]) == ({"context": 32768, "output": 4096}, 32768)
    assert (large["harness"], large["quant"], large["pinned_on"]) == ("vllm", "fp8", ["beast"])
    assert (entries["org/small"]["limit"], entries["org/small"]["max_model_len"]) == (None, None)


async def test_loaded_and_where(start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron) -> None:
    """Every healthy neuron that lists a model is a location with its status; `loaded` means that one has it loaded."""
    beast.models["org/small"] = "loaded"
    benjy.models["org/small"] = "failed"
    cortex = await start_cortex([beast, benjy], [SMALL])
    entry = (await listed(cortex))["org/small"]
    assert entry["loaded"] is True
    assert entry["locations"] == [
        {"node": "beast", "status": "loaded", "vram_estimate_mb": 1},
        {"node": "benjy", "status": "failed", "vram_estimate_mb": 1},
    ]


@pytest.mark.parametrize(
    ("status", "is_listed"),
    [("loaded", True), ("loading", False), ("unloaded", False), ("failed", False), ("dreaming", False)],
)
async def test_models_that_only_a_neuron_knows(
    start_cortex: StartCortex, benjy: V1Neuron, status: str, is_listed: bool
) -> None:
    """Models loaded anywhere are listed even if they are not in the catalogue."""
    benjy.models["someone/elses"] = status
    cortex = await start_cortex([benjy], [])
    entries = await listed(cortex)
    assert ("someone/elses" in entries) is is_listed
    if is_listed:
        entry = entries["someone/elses"]
        assert (entry["loaded"], entry["feasible_on"], entry["limit"]) == (True, [], None)


async def test_infeasible_model_is_listed_while_it_is_loaded(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """An operator loaded it by hand, so clients can use it."""
    benjy.models["org/huge"] = "loaded"
    cortex = await start_cortex([benjy], [HUGE])
    entry = (await listed(cortex))["org/huge"]
    assert (entry["loaded"], entry["feasible_on"]) == (True, [])


async def test_aliases_are_listed_like_their_model(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """`alias_of` has their target; an alias of a model that is not listed is not listed either."""
    aliases = {"small": "org/small", "huge": "org/huge"}
    cortex = await start_cortex([benjy], [SMALL, HUGE], aliases=aliases)
    entries = await listed(cortex)
    assert set(entries) == {"org/small", "small"}
    assert entries["small"] == {**entries["org/small"], "id": "small", "alias_of": "org/small"}
    assert "alias_of" not in entries["org/small"]


async def test_variants_are_listed(start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron) -> None:
    """A client that only offers listed models can insist on a variant. Each location has its variant; of a neuron that
    does not report it, the first that the neuron can hold. A variant that no neuron can hold is not listed."""
    model = {
        "id": "org/m",
        "variants": [
            {"quant": "fp8", "vram_mb": 27000, "min_device_vram_mb": 30000},
            {"quant": "awq", "vram_mb": 9000},
            {"name": "huge", "min_devices": 8},
        ],
    }
    beast.models["org/m"] = "loaded"
    benjy.models["org/m"] = "loaded"
    aliases = {"m": "org/m", "exact": "org/m@fp8", "never": "org/m@huge"}
    cortex = await start_cortex([beast, benjy], [model, SMALL], aliases=aliases)
    entries = await listed(cortex)
    assert list(entries) == ["org/m", "org/small", "org/m@fp8", "org/m@awq", "m", "exact"]
    assert (entries["org/m"]["variants"], entries["org/m"]["feasible_on"]) == (
        ["fp8", "awq", "huge"],
        ["beast", "benjy"],
    )
    assert {place["node"]: place["variant"] for place in entries["org/m"]["locations"]} == {
        "beast": "fp8",
        "benjy": "awq",
    }
    assert "variants" not in entries["org/small"]
    fp8 = entries["org/m@fp8"]
    assert (fp8["variant"], fp8["variant_of"], fp8["feasible_on"], fp8["quant"]) == ("fp8", "org/m", ["beast"], "fp8")
    assert [place["node"] for place in fp8["locations"]] == ["beast"]
    assert entries["exact"] == {**fp8, "id": "exact", "alias_of": "org/m@fp8"}
    async with cortex.http.get(f"{cortex.url}/v1/models/org/m@awq") as response:
        assert await response.json() == entries["org/m@awq"]
    async with cortex.http.get(f"{cortex.url}/v1/models/org/m@int4") as response:
        assert response.status == 404
        assert "'org/m' has the variants fp8, awq, huge" in (await response.json())["error"]["message"]
    beast.models["org/m"] = "unloaded"

    async def unloaded() -> bool:
        return not (await listed(cortex))["org/m@fp8"]["loaded"]

    await until(unloaded)
    assert (await listed(cortex))["org/m"]["loaded"]


async def test_neuron_that_is_down(start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Its models stay feasible there, because it will return; what was loaded on it does not count as loaded."""
    async with V1Neuron("quadbrat", 12000).running() as quadbrat:
        quadbrat.models["org/small"] = "loaded"
        quadbrat.models["own/model"] = "loaded"
        cortex = await start_cortex([benjy, quadbrat], [SMALL])
        assert (await listed(cortex))["org/small"]["loaded"]
    await cortex.until(lambda: not cortex.parts.fleet.snapshot().nodes["quadbrat"].healthy)
    entries = await listed(cortex)
    assert set(entries) == {"org/small"}
    entry = entries["org/small"]
    assert (entry["loaded"], entry["feasible_on"], entry["locations"]) == (False, ["benjy", "quadbrat"], [])


async def test_list_is_empty_before_any_neuron_has_answered(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The list is valid and empty."""
    benjy.silent = True
    cortex = await start_cortex([benjy], [SMALL], wait_healthy=False)
    assert await listed(cortex) == {}


@pytest.mark.parametrize("name", ["org/small", "small", "a/b/c:d é", "100%"])
async def test_one_model_by_its_id(start_cortex: StartCortex, benjy: V1Neuron, name: str) -> None:
    """The path may have plain or percent-encoded slashes, and characters that must be encoded."""
    benjy.models["a/b/c:d é"] = benjy.models["100%"] = "loaded"
    cortex = await start_cortex([benjy], [SMALL], aliases={"small": "org/small"})
    for path in (quote(name), quote(name, safe="")):
        async with cortex.http.get(f"{cortex.url}/v1/models/{path}") as response:
            assert response.status == 200
            assert (await response.json())["id"] == name


async def test_unknown_model_by_its_id(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """An unknown id is a 404 in the envelope."""
    cortex = await start_cortex([benjy], [SMALL])
    async with cortex.http.get(f"{cortex.url}/v1/models/org/unknown") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def test_openai_client_reads_the_list(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The real client reads the list and a single model."""
    cortex = await start_cortex([benjy], [SMALL])
    async with openai.AsyncOpenAI(base_url=f"{cortex.url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["org/small"]
        assert (await client.models.retrieve("org/small")).owned_by == "cortex"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/unknown")
