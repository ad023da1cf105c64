"""What a cortex that speaks only protocol v1 gets from neuron: `tests.neuron.v1_cortex`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from neuron.api import protocol_v1
from neuron.config import NeuronConfig
from neuron.engine.keys import gets_key
from tests.neuron.lasting import leaving
from tests.neuron.neurons import Neuron, config_of, neuron_here, neuron_process, toml_config, until
from tests.neuron.v1_cortex import V1Cortex, v1_cortex

A, B = "org/model-a", "org/model-b"
WHOLE_CARD_MB = 30_000
ONE_CARD = {"devices": ["RTX 5090"]}


@contextlib.asynccontextmanager
async def answering(
    neuron: Neuron, model: str, url: str, key: str | None = None, *, tokens: int = 400
) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer of two seconds that has begun; more `tokens` take longer."""
    body = {"model": model, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{url}/v1/completions", json=body) as stream,
    ):
        await until(lambda: neuron.activity().get(model))
        yield stream


def config(
    directory: Path, *, vram_mb: int = WHOLE_CARD_MB, load_secs: float | None = 0.2, **changes: Any
) -> NeuronConfig:
    """One simulated card, and engines that take `vram_mb` of it: protocol v1 has no field for that. `load_secs` None:
    as their loads say."""
    arguments = [*([] if load_secs is None else ["--load-secs", str(load_secs)]), "--vram-mb", str(vram_mb)]
    return config_of(directory / "state", simulate=ONE_CARD, sim={"extra_args": arguments}, **changes)


@pytest.fixture
async def cortex(mark: str, tmp_path: Path) -> AsyncIterator[V1Cortex]:
    """Before a neuron with one card, and models that need all of it."""
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as made:
        yield made


@pytest.mark.parametrize(
    ("mode", "has_token", "carries_keys", "v1_callers", "keyed"),
    [
        ("auto", False, True, False, True),
        ("auto", False, False, False, False),
        ("auto", False, True, True, False),
        ("auto", True, False, True, True),
        ("always", False, False, True, True),
        ("never", True, True, False, False),
    ],
)
def test_which_engines_get_a_key(mode: Any, has_token: bool, carries_keys: bool, v1_callers: bool, keyed: bool) -> None:
    """By default: where the caller can send it and none that cannot has come, and always with a token."""
    assert gets_key(mode, has_token=has_token, carries_keys=carries_keys, v1_callers=v1_callers) is keyed


async def test_what_it_forwards_is_served(cortex: V1Cortex) -> None:
    """Load, chat and stream; an unloaded model is loaded again by its endpoint, and never a 404."""
    assert "chat.completion" in await cortex.forward(A)
    assert (await cortex.forward(A, stream=True)).endswith("data: [DONE]\n\n")
    assert (await cortex.unload(A)).status == 200
    assert (await cortex.listed())[A] == "unloaded"
    assert "chat.completion" in await cortex.forward(A)


async def test_two_models_by_turns_on_one_card(cortex: V1Cortex) -> None:
    """The endpoint of an unloaded model makes room for it: idle engines without a key end."""
    for model in (A, B, A, B):
        assert "chat.completion" in await cortex.forward(model)
        assert [each for each, status in (await cortex.listed()).items() if status == "loaded"] == [model]


async def test_a_running_answer_is_not_cut(mark: str, tmp_path: Path) -> None:
    """The endpoint waits until the other model has answered."""
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as cortex:
        await cortex.forward(A)
        url = await cortex.route(B)
        async with answering(neuron, B, url) as stream:
            found = asyncio.create_task(cortex.endpoint(A))
            assert "[DONE]" in await stream.text()
        assert "chat.completion" in await cortex.forward(A, to=(await found).body["url"])


async def test_both_models_at_once_on_one_card(cortex: V1Cortex) -> None:
    """A model whose endpoint was told a moment ago stays until the request has come: every request is answered."""
    for model in (A, B):
        await cortex.forward(model)

    async def ask(model: str) -> str:
        found = await cortex.endpoint(model)
        assert found.status == 200, found.body
        return await cortex.forward(model, to=found.body["url"])

    answers = await asyncio.gather(*(ask(model) for model in (A, B) * 3))
    assert all("chat.completion" in answer for answer in answers)


async def test_without_room_the_catalogue_decides(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that waited for too long says that memory lacks. Then the model is not listed: this cortex places it
    itself and evicts others."""
    monkeypatch.setattr(protocol_v1, "ROOM_SECS", 0.3)
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as cortex:
        await cortex.forward(A)
        url = await cortex.route(B)
        async with answering(neuron, B, url) as stream:
            refused = await cortex.endpoint(A)
            assert (refused.status, refused.error["code"]) == (409, "insufficient_vram")
            assert A not in await cortex.listed()
            assert (await neuron.model(A))["status"] == "unloaded"
            assert "[DONE]" in await stream.text()
        assert "chat.completion" in await cortex.forward(A)
        assert (await cortex.listed())[A] == "loaded"


async def test_a_running_load_is_joined(cortex: V1Cortex) -> None:
    """By ten requests for the endpoint, without a second engine."""
    await cortex.forward(A)
    await cortex.unload(A)
    answers = await asyncio.gather(*(cortex.endpoint(A) for _ in range(10)))
    assert {(each.status, each.body["url"]) for each in answers} == {(200, answers[0].body["url"])}


async def test_a_failed_load_is_a_clear_error(mark: str, tmp_path: Path) -> None:
    """The endpoint tries again, and answers with the engine's error; then the model is left to the catalogue, as this
    cortex takes `failed` for loaded."""
    faulty = config_of(tmp_path / "state", sim={"extra_args": ["--load-secs", "0.1", "--fault", "oom-at-load"]})
    async with neuron_here(faulty) as neuron, v1_cortex(neuron) as cortex:
        assert (await cortex.load(A)).error["code"] == "load_failed"
        assert (await cortex.listed())[A] == "failed"
        answer = await cortex.endpoint(A)
        assert (answer.status, answer.error["code"], answer.error["cause"]) == (500, "load_failed", "node")
        assert "out of memory" in answer.error["message"]
        assert A not in await cortex.listed()
        assert (await neuron.model(A))["status"] == "failed"
        assert (await cortex.load(A)).error["code"] == "load_failed"
        assert (await cortex.listed())[A] == "failed"
        assert (await cortex.endpoint("org/never-asked-for")).error["code"] == "model_not_found"


async def test_the_engine_dies(mark: str, tmp_path: Path) -> None:
    """The endpoint waits for the next engine, which needs no key either."""
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as cortex:
        await cortex.forward(A)
        psutil.Process((await neuron.model(A))["pid"]).kill()
        await neuron.until_status(A, "recovering")
        assert "chat.completion" in await cortex.forward(A, to=(await cortex.endpoint(A)).body["url"])


async def test_a_sleeping_model_wakes(mark: str, tmp_path: Path) -> None:
    """It takes `sleeping` for loaded, so the endpoint wakes the model."""
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as cortex:
        await cortex.forward(A)
        assert (await neuron.call("POST", "/models/sleep", json={"model_id": A})).status == 200
        assert "chat.completion" in await cortex.forward(A, to=(await cortex.endpoint(A)).body["url"])


async def test_after_a_restart_of_neuron(mark: str, tmp_path: Path) -> None:
    """Engines without a key are adopted, serve this cortex and the other one, and later loads get no key either."""
    path = leaving(toml_config(tmp_path, "port = 0", f'state_dir = "{tmp_path / "state"}"'))
    async with neuron_process(path) as neuron, v1_cortex(neuron) as cortex:
        url = await cortex.route(A)
    path.write_text(path.read_text().replace("leave_engines", "stop_engines"))
    async with neuron_process(path) as neuron, v1_cortex(neuron) as cortex:
        await neuron.until_status(A, "loaded")
        assert await cortex.route(A) == url
        await cortex.forward(A)
        assert (await neuron.endpoint(A)).body == {"url": url, "api_key": None}
        await neuron.unload(A)
        assert (await neuron.load(A, vram_mb=1000)).body["api_key"] is None


async def test_models_loaded_at_startup(mark: str, tmp_path: Path) -> None:
    """Serve any cortex: they have no key on a neuron without a token."""
    models = [{"model_id": A, "harness": "sim"}]
    async with neuron_here(config(tmp_path, default_models=models)) as neuron, v1_cortex(neuron) as cortex:
        await neuron.until_status(A, "loaded")
        await cortex.forward(A)


async def test_a_model_that_another_cortex_loaded(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine has a key: when it is idle it starts without one, and the error of a wait that is too long says so."""
    monkeypatch.setattr(protocol_v1, "ROOM_SECS", 0.3)
    async with neuron_here(config(tmp_path)) as neuron, v1_cortex(neuron) as cortex:
        found = (await neuron.load(A)).body
        assert found["api_key"]
        async with answering(neuron, A, found["url"], found["api_key"]) as stream:
            for refused in await asyncio.gather(cortex.endpoint(A), cortex.load(A)):
                assert (refused.status, refused.error["code"]) == (503, "engine_key_required")
                assert "engine_keys" in refused.error["message"]
                assert "Retry-After" in refused.headers
            assert "[DONE]" in await stream.text()
        assert "chat.completion" in await cortex.forward(A)
        # From now on this neuron's engines have no key, also when this caller loads them.
        await neuron.unload(A)
        assert (await neuron.load(A)).body["api_key"] is None


async def test_a_neuron_with_a_token_keeps_its_keys(
    mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine is not open where neuron is not; the log says what a cortex before it would need."""
    async with neuron_here(config(tmp_path, token="secret")) as neuron, v1_cortex(neuron) as cortex:
        assert (await cortex.load(A)).status == 401
        cortex.session.headers["Authorization"] = "Bearer secret"
        with caplog.at_level(logging.WARNING):
            assert (await cortex.load(A)).status == 200
            found = (await cortex.endpoint(A)).body
        async with cortex.session.get(f"{found['url']}/v1/models") as response:
            assert response.status == 401
        headers = {"Authorization": f"Bearer {found['api_key']}"}
        async with cortex.session.get(f"{found['url']}/v1/models", headers=headers) as response:
            assert response.status == 200
    warnings = [record.getMessage() for record in caplog.records if "engine_keys" in record.getMessage()]
    assert len(warnings) == 1


async def test_keys_always(mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """engine_keys = "always": the endpoint names the setting instead of letting requests end in 401."""
    async with neuron_here(config(tmp_path, engine_keys="always")) as neuron, v1_cortex(neuron) as cortex:
        with caplog.at_level(logging.WARNING):
            assert (await cortex.load(A)).status == 200
        assert "engine_keys" in caplog.text
        refused = await cortex.endpoint(A)
        assert (refused.status, refused.error["code"]) == (409, "engine_key_required")
        assert "engine_keys" in refused.error["message"]
        assert (await neuron.endpoint(A)).body["api_key"]


async def test_keys_never(mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """engine_keys = "never" opens engines even with a token, and says so at the start; an operator's own key in `env`
    does not reach them."""
    sim = {"env": {"VLLM_API_KEY": "own"}}
    with caplog.at_level(logging.WARNING):
        async with neuron_here(config_of(tmp_path / "state", token="secret", engine_keys="never", sim=sim)) as neuron:
            assert 'engine_keys is "never"' in caplog.text
            found = (await neuron.load(A)).body
            assert found["api_key"] is None
            async with neuron.session.get(f"{found['url']}/v1/models", headers={"Authorization": ""}) as response:
                assert response.status == 200


async def test_figures_as_strict_readers_want_them(cortex: V1Cortex) -> None:
    """Whole numbers where protocol v1 has them, and no `activation` of another form once such a cortex is known."""
    await cortex.forward(A)
    told = (await cortex.call("GET", "/health")).body
    assert isinstance(told["uptime_secs"], int)
    assert "activation" not in told
    names = ("index", "vram_used_mb", "vram_free_mb", "utilization_pct", "temp_c")
    assert all(isinstance(device[name], int) for device in told["devices"] for name in names)


@pytest.mark.parametrize(
    "changes",
    [
        {"devices": []},
        {"devices": None, "unknown": {"a": [1]}},
        {"harness": "sim", "tensor_parallel": 1},
        {"harness": None, "devices": [0]},
        {"model_id": f"huggingface:{A}"},
    ],
)
async def test_odd_loads(cortex: V1Cortex, changes: dict[str, Any]) -> None:
    """Empty and missing devices, unknown fields, a registry before the id: found under the plain id, encoded or not."""
    assert (await cortex.load(A, **changes)).status == 200
    assert (await cortex.call("GET", f"/models/{A}/endpoint")).status == 200
    await cortex.forward(A)


async def test_the_longest_idle_engine_ends(mark: str, tmp_path: Path) -> None:
    """Only as many end as are needed, the longest idle first. An engine that has a key is not touched."""
    async with neuron_here(config(tmp_path, vram_mb=10_000)) as neuron, v1_cortex(neuron) as cortex:
        assert (await neuron.load("keyed")).body["api_key"]
        for model in ("wanted", "early", "late"):
            assert (await cortex.load(model)).status == 200
            if model == "wanted":
                await cortex.unload(model)
        for model in ("early", "late"):
            await cortex.forward(model)
            await until(
                lambda model=model: (model, 1) in [(each.id, each.ended) for each in neuron.registry.activity()]
            )
        await cortex.forward("wanted")
        listed = await cortex.listed()
        assert listed == {"keyed": "loaded", "wanted": "loaded", "early": "unloaded", "late": "loaded"}


async def test_several_instances(mark: str, tmp_path: Path) -> None:
    """The entry that such a cortex keeps, the last, is of an instance that it can use; its requests go to the instances
    by turns; its unload ends all of them, and its endpoint loads the model again."""
    shared = config(tmp_path, vram_mb=5000, load_secs=None, engine_keys="never")
    async with neuron_here(shared) as neuron, v1_cortex(neuron) as cortex:
        for instance in ("0", "1", "2"):
            assert (await neuron.load(A, instance=instance, devices=[0])).status == 200
        urls = {await cortex.route(A) for _ in range(6)}
        assert len(urls) == 3
        for url in urls:
            await cortex.forward(A, to=url)
        assert (await neuron.call("POST", "/models/sleep", json={"model_id": A, "instance": "2"})).status == 200
        await neuron.load(A, "--load-secs", "60", wait=False, instance="3", devices=[0])
        listed = [each for each in (await cortex.call("GET", "/models")).body if each["id"] == A]
        assert [each["instance"] for each in listed] == ["3", "2", "0", "1"]

        async def ended() -> list[dict[str, Any]] | None:
            models: list[dict[str, Any]] = (await cortex.call("GET", "/health")).body["models"]
            return models if [each["ended"] for each in models] == [2] else None

        assert await until(ended) == [{"id": A, "in_flight": 0, "queue_depth": 0, "ended": 2}]
        assert len({await cortex.route(A) for _ in range(4)}) == 2
        assert (await cortex.unload(A)).status == 200
        assert await cortex.listed() == {A: "unloaded"}
        await cortex.forward(A)
        assert await cortex.listed() == {A: "loaded"}


async def test_an_idle_instance_starts_without_its_key(mark: str, tmp_path: Path) -> None:
    """Of several instances with a key the idle one starts again without it, and the others keep theirs."""
    async with neuron_here(config(tmp_path, vram_mb=5000)) as neuron, v1_cortex(neuron) as cortex:
        loaded = [(await neuron.load(A, instance=each, devices=[0])).body for each in ("0", "1")]
        async with answering(neuron, A, loaded[0]["url"], loaded[0]["api_key"], tokens=1000) as stream:
            await cortex.forward(A)
            assert "[DONE]" in await stream.text()
        keys = {each["instance"]: each["endpoint"]["api_key"] for each in (await neuron.call("GET", "/models")).body}
        assert keys == {"0": loaded[0]["api_key"], "1": None}
