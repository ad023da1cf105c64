"""Requests for an alias with parameters, as their engine gets them."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cortex.config.aliases import Alias
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.proxy.test_uploads import MIB, Engine, form, upload
from tests.cortex.proxy.translation.chat_engine import ChatEngine
from tests.cortex.raw_http import bounded, connected, request

MODEL = "org/model"
SET = {"chat_template_kwargs": {"enable_thinking": False}}
FAST = {"model": MODEL, "set": SET, "default": {"temperature": 0.2}, "drop": ["top_k"]}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def cortex(start_cortex: StartCortex, benjy: V1Neuron) -> RunningCortex:
    benjy.models[MODEL] = "loaded"
    return await start_cortex(
        [benjy],
        [{"id": MODEL, "variants": [{"quant": "fp8"}, {"quant": "awq"}]}],
        aliases={"fast": FAST},
        gateway={"default_model": "fast"},
    )


async def ask(cortex: RunningCortex, body: bytes, **headers: str) -> None:
    url, headers = f"{cortex.url}/v1/chat/completions", {"Content-Type": "application/json", **headers}
    async with cortex.http.post(url, data=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()


def asked(benjy: V1Neuron) -> Any:
    return json.loads(benjy.engine.requests[-1][2])


async def test_engine_gets_the_parameters(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """Also for a compressed body, and for one that names no model, for which `default_model` is an alias. A request for
    the model itself stays as it is."""
    body = b'{"model": "fast", "messages": [ {"role": "user", "content": "hi"} ], "top_k": 5 , "temperature": 1e0}'
    await ask(cortex, body)
    kwargs = b', "chat_template_kwargs": {"enable_thinking": false}}'
    expected = body.replace(b"fast", MODEL.encode()).replace(b', "top_k": 5', b"")[:-1] + kwargs
    assert benjy.engine.requests[-1][2] == expected
    await ask(cortex, gzip.compress(body), **{"Content-Encoding": "gzip"})
    assert benjy.engine.requests[-1][2] == expected
    await ask(cortex, json.dumps(CHAT).encode())
    assert asked(benjy) == {**CHAT, "model": MODEL, **SET, "temperature": 0.2}
    plain = body.replace(b"fast", MODEL.encode())
    await ask(cortex, plain)
    assert benjy.engine.requests[-1][2] == plain


async def test_they_are_listed_and_explained(cortex: RunningCortex, benjy: V1Neuron) -> None:
    async with cortex.http.get(f"{cortex.url}/v1/models/fast") as answer:
        listed = json.loads(await answer.read())
    told = {key: value for key, value in FAST.items() if key != "model"}
    assert (listed["alias_of"], listed["alias_parameters"]) == (MODEL, told)
    async with cortex.http.get(f"{cortex.url}/v1/models") as answer:
        assert listed in json.loads(await answer.read())["data"]
    for name in ("fast", "fast@awq"):
        async with cortex.http.get(f"{cortex.url}/fleet/explain", params={"model": name}) as answer:
            assert json.loads(await answer.read())["alias"] == {"name": name, **told}
    async with cortex.http.get(f"{cortex.url}/fleet") as answer:
        assert json.loads(await answer.read())["aliases"] == {"fast": MODEL}


async def test_a_reload_changes_them(cortex: RunningCortex, benjy: V1Neuron) -> None:
    live = cortex.parts.live
    changed = live.catalogue.model_copy(update={"aliases": {"fast": Alias(model=MODEL, set={"seed": 7})}})
    live.replace(live.config, type(changed).model_validate(changed.model_dump()), live.files)
    await ask(cortex, b'{"model":"fast","top_k":5}')
    assert benjy.engine.requests[-1][2] == b'{"model":"org/model","top_k":5, "seed": 7}'


async def test_translated_requests(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The client's body is edited, in its own dialect, before it is translated for an engine without that path."""
    async with ChatEngine().running() as engine:
        assert isinstance(engine, ChatEngine)
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        cortex = await start_cortex([benjy], [{"id": MODEL}], aliases={"fast": FAST})
        for path, more in (("/v1/messages", {"max_tokens": 9, **CHAT}), ("/v1/responses", {"input": "hi"})):
            body = json.dumps({"model": "fast", "top_k": 5, **more}).encode()
            async with connected(cortex.url) as client:
                assert (await client.ask(request(body, target=path))).status == 200
            sent = engine.chat
            assert (sent["model"], sent["chat_template_kwargs"], sent["temperature"], sent.get("top_k")) == (
                *(MODEL, SET["chat_template_kwargs"], 0.2),
                None,
            )


FORM_ALIAS = {"model": MODEL, "set": {"language": "en"}}
LANGUAGE = b'--XX\r\nContent-Disposition: form-data; name="language"\r\n\r\nen\r\n'


@pytest.fixture
async def engine(benjy: V1Neuron) -> AsyncIterator[Engine]:
    async with Engine().running() as engine:
        benjy.models[MODEL], benjy.engine_url = "loaded", engine.url
        assert isinstance(engine, Engine)
        yield engine


@pytest.mark.parametrize("size", [100, 3 * MIB], ids=["in memory", "on disk"])
@pytest.mark.parametrize("model_last", [True, False])
async def test_forms(
    start_cortex: StartCortex, benjy: V1Neuron, engine: Engine, *, size: int, model_last: bool
) -> None:
    """Whatever their size, and wherever their `model` is: those that usually pass through wait until complete."""
    cortex = await start_cortex([benjy], [{"id": MODEL}], aliases={"voice": FORM_ALIAS})
    async with connected(cortex.url) as client:
        got = await bounded(client.ask(upload(form("voice", size, model_last=model_last))))
    assert got.status == 200
    file = form(MODEL, size, model_last=True).removesuffix(b"--XX--\r\n")
    assert engine.bodies == [file + LANGUAGE + b"--XX--\r\n"]
    assert int(engine.heads[0]["content-length"]) == len(engine.bodies[0])
