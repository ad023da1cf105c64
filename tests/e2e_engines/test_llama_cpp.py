"""A real llama.cpp server through the fleet. It starts in half a second."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import openai
import pytest

from tests.e2e_engines.fleet import BROKEN_GGUF, GGUF, Engines, running_mixed_fleet
from tests.processes import eventually, of_session
from tests.services import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

MESSAGES = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


def test_completions_and_responses_are_answered(client: openai.OpenAI) -> None:
    """Also by the model's alias, and over an API that cortex translates if the engine lacks it."""
    assert client.completions.create(model="gguf", prompt="Once", max_tokens=4).choices[0].text
    answer = client.responses.create(model=GGUF, input="Hi", max_output_tokens=16)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0


def test_connections_are_kept(fleet: Fleet) -> None:
    """Requests over one connection of a client: the engine's answer does not end it."""
    connection = http.client.HTTPConnection(fleet.cortex.url.removeprefix("http://"), timeout=60)
    body = json.dumps({"model": GGUF, **MESSAGES})
    used = []
    for _ in range(3):
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["usage"]["completion_tokens"]) == (200, 4)
        used.append(connection.sock.getsockname())
    connection.close()
    assert len(set(used)) == 1


def test_a_load_tells_its_progress_and_an_unload_leaves_nothing(fleet: Fleet) -> None:
    answer = fleet.cortex.request("/v1/chat/completions", {"model": GGUF, **MESSAGES})
    assert answer.status == 200
    entry = fleet.status_of(GGUF)
    assert entry is not None
    log = fleet.neuron.request(f"/models/{GGUF.replace('/', '%2F')}/logs").body
    assert "load_model: loading model" in json.dumps(log)
    leader = fleet.engine_of(GGUF)[0].pid
    assert fleet.unload(GGUF).status == 200
    eventually(lambda: not of_session(leader), "the engine's processes are gone", within_secs=20)
    entry = fleet.status_of(GGUF)
    assert entry is None or entry["status"] == "unloaded"


def test_a_damaged_file_is_the_fault_of_the_model(fleet: Fleet) -> None:
    """The refusal has llama.cpp's own words, and is not repeated for each request."""
    answer = fleet.cortex.request("/v1/chat/completions", {"model": BROKEN_GGUF, **MESSAGES})
    entry = fleet.status_of(BROKEN_GGUF)
    assert answer.status >= 500, (answer, entry)
    assert "failed to read key-value pairs" in answer.body["error"]["message"], (entry, fleet.neuron.log_tail())
    assert entry is not None
    assert (entry["status"], entry["cause"], entry["permanent"]) == ("failed", "model", True)


def test_an_engine_survives_its_neuron(engines: Engines, tmp_path: Path) -> None:
    """kill -9 of neuron: the next one adopts the engine, which answers without a new load."""
    with running_mixed_fleet(tmp_path, engines) as fleet:

        def answered() -> bool:
            return fleet.cortex.request("/v1/chat/completions", {"model": GGUF, **MESSAGES}).status == 200

        assert answered()
        leader = fleet.engine_of(GGUF)[0].pid
        fleet.neuron.kill_and_restart()
        eventually(fleet.neuron.answers, "the new neuron answers", within_secs=30)
        eventually(answered, "cortex has noticed the new neuron", within_secs=30)
        entry = fleet.status_of(GGUF)
        assert entry is not None
        assert (entry["status"], entry["pid"]) == ("loaded", leader)
        assert fleet.unload(GGUF).status == 200
        eventually(lambda: not of_session(leader), "the engine's processes are gone", within_secs=20)
