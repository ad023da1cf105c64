"""Requests that insist on a variant of a model, on neurons of protocol v1, which do not report variants."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from cortex.config.catalogue import Catalogue
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.control.test_request_limits import LIMIT, LimitedNeuron
from tests.cortex.cortex_process import cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

MODEL = "org/m"
FP8 = {"quant": "fp8", "vram_mb": 27000, "min_device_vram_mb": 30000, "args": ["--x"]}
AWQ = {"quant": "awq", "vram_mb": 9000, "source": "org/m-awq"}
VARIANTS = {"id": MODEL, "variants": [FP8, AWQ]}


async def ask(cortex: RunningCortex, model: str) -> tuple[int, str | None, dict[str, Any]]:
    body = {"model": model, "prompt": "hi"}
    async with cortex.http.post(f"{cortex.url}/v1/completions", json=body) as response:
        return response.status, response.headers.get("x-cortex-node"), json.loads(await response.read())


async def test_each_variant_is_loaded_where_it_can_be(
    start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron
) -> None:
    """The load has the variant's fields, the engine gets the plain id, and only its engines answer."""
    cortex = await start_cortex([beast, benjy], [VARIANTS], aliases={"small": f"{MODEL}@awq"})
    status, node, echoed = await ask(cortex, "small")
    assert (status, node) == (200, "benjy")
    assert echoed["model"] == MODEL
    assert (await ask(cortex, MODEL))[:2] == (200, "benjy")
    assert (await ask(cortex, f"{MODEL}@fp8"))[:2] == (200, "beast")
    for neuron, quant, source in ((beast, "fp8", None), (benjy, "awq", "org/m-awq")):
        [load] = neuron.loads
        assert (load["model_id"], load["quant"], load.get("source")) == (MODEL, quant, source)
    for name, expected in ((f"{MODEL}@fp8", "beast"), (f"{MODEL}@awq", "benjy"), (f"{MODEL}@fp8", "beast")):
        assert {(await ask(cortex, name))[1] for _ in range(3)} == {expected}
    async with cortex.http.get(f"{cortex.metrics_url}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if line.startswith("cortex_requests_total{")]
    assert {line.partition('model="')[2].partition('"')[0] for line in lines} == {MODEL}


async def test_a_variant_that_does_not_exist(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """404 with those that exist; one that no neuron can hold gets the reasons. An id may contain an `@`."""
    benjy.models["someone@home"] = "loaded"
    cortex = await start_cortex([benjy], [VARIANTS, {"id": "org/b@c"}])
    status, _, answer = await ask(cortex, f"{MODEL}@int4")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert f"'{MODEL}' has the variants fp8, awq" in answer["error"]["message"]
    status, _, answer = await ask(cortex, f"{MODEL}@fp8")
    assert (status, answer["error"]["code"]) == (404, "no_feasible_neuron")
    for name in ("org/b@c", "someone@home"):
        assert (await ask(cortex, name))[:2] == (200, "benjy")
    status, _, answer = await ask(cortex, "org/b@c@fp8")
    assert status == 404
    assert "'org/b@c' has no variants" in answer["error"]["message"]


async def test_requests_for_a_variant_and_for_its_model_share_a_limit(start_cortex: StartCortex) -> None:
    """No more at a time than the neuron allows, and each that ends lets one of either kind in."""
    async with LimitedNeuron("n", max_in_flight=LIMIT, max_queue_depth=8).running() as neuron:
        assert isinstance(neuron, LimitedNeuron)
        cortex = await start_cortex([neuron], [VARIANTS])
        names = [MODEL, f"{MODEL}@awq"] * LIMIT * 2
        asked = [asyncio.create_task(ask(cortex, name)) for name in names]
        await until(lambda: neuron.now == LIMIT)
        neuron.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*asked)] == [200] * len(names)
        assert neuron.most == LIMIT
        assert not neuron.loads


async def test_a_variant_is_renamed_while_its_model_is_loaded(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The old name is gone at once, and the new one means the engine of a neuron that does not report variants."""
    benjy.models[MODEL] = "loaded"
    cortex = await start_cortex([benjy], [VARIANTS])
    assert (await ask(cortex, f"{MODEL}@awq"))[0] == 200
    live = cortex.parts.live
    renamed = {"id": MODEL, "variants": [FP8, {**AWQ, "name": "small"}]}
    live.replace(live.config, Catalogue.model_validate({"models": [renamed]}), [])
    assert (await ask(cortex, f"{MODEL}@awq"))[0] == 404
    assert (await ask(cortex, f"{MODEL}@small"))[0] == 200
    assert (await ask(cortex, MODEL))[0] == 200
    live.replace(live.config, Catalogue.model_validate({"models": [{"id": MODEL}]}), [])
    assert (await ask(cortex, f"{MODEL}@small"))[0] == 404
    assert (await ask(cortex, MODEL))[0] == 200
    assert not benjy.loads


async def test_two_workers_know_the_variants(tmp_path: Path, beast: V1Neuron, benjy: V1Neuron) -> None:
    """They route by the table that the control sends them."""
    async with (
        cortex_process(tmp_path, [beast, benjy], [VARIANTS], workers=2) as cortex,
        aiohttp.ClientSession() as session,
    ):
        for name, node in ((f"{MODEL}@awq", "benjy"), (f"{MODEL}@fp8", "beast")):
            for _ in range(8):
                async with session.post(
                    f"{cortex.url}/v1/completions", json={"model": name, "prompt": "x"}
                ) as response:
                    assert (response.status, response.headers["x-cortex-node"]) == (200, node)
                    assert (await response.json())["model"] == MODEL
    assert len(beast.loads) == len(benjy.loads) == 1
