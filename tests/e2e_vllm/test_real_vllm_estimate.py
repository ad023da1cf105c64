"""neuron's estimates, compared with what the real vLLM logs.

Right after test_real_vllm.py, which leaves its engines loaded for these tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.e2e_vllm.fleet import MINILM, PAIR, TINY
from tests.services import Fleet

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

CACHE_BYTES = 64 << 20  # of each device: `--kv-cache-memory-bytes 64M` of every engine of this fleet
_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")


@pytest.fixture(scope="module", autouse=True)
def _unload_the_pair(fleet: Fleet) -> Iterator[None]:
    """No later test needs it."""
    yield
    fleet.unload(PAIR)


def loaded_log(fleet: Fleet, model: str) -> str:
    """The log of the model's engine, after loading it if necessary."""
    loaded = fleet.cortex.request("/fleet/load", {"model": model})
    assert loaded.status == 200, f"{loaded.body}\n{fleet.neuron.log_tail()}"
    log = fleet.neuron.request(f"/models/{quote(model, safe='')}/logs?tail=10000")
    return "\n".join(log.body["lines"])


def estimated(fleet: Fleet, model: str, **parameters: object) -> dict[str, Any]:
    answer = fleet.neuron.request(f"/estimate?{urlencode({'model': model, **parameters})}")
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.body
    return body


def cached(body: dict[str, Any]) -> dict[str, Any]:
    """The one line about the KV cache."""
    found: list[dict[str, Any]] = [line for line in body["lines"] if line["what"].startswith("KV cache")]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("model", [TINY, PAIR])
def test_bytes_of_a_token_are_vllms(fleet: Fleet, model: str) -> None:
    """The exact number of tokens that fit into a cache of a known size, on one device and on two."""
    said = _CACHE.search(loaded_log(fleet, model))
    assert said is not None
    tokens, length, concurrency = (float(figure.replace(",", "")) for figure in said.groups())
    body = estimated(fleet, model)
    line = cached(body)
    assert body["max_model_len"] == length == 512
    assert line["device_mb"] == CACHE_BYTES >> 20
    assert line["total_mb"] == body["split_over"] * line["device_mb"]
    fits = re.search(r"fits ([\d.]+) sequences of 512 tokens", line["how"])
    assert fits is not None, line["how"]
    assert float(fits[1]) == concurrency
    assert tokens == concurrency * length


def test_length_is_the_one_that_vllm_derives(fleet: Fleet) -> None:
    """The length comes from the arguments if given, otherwise from the model."""
    assert "Using max model len 512" in loaded_log(fleet, TINY)
    assert estimated(fleet, TINY)["max_model_len"] == 512
    assert estimated(fleet, TINY, max_model_len="auto")["max_model_len"] == 2048


def test_an_encoder_has_no_cache_in_vllm_either(fleet: Fleet) -> None:
    """all-MiniLM-L6-v2 has no KV cache, although this fleet passes a cache size to every engine."""
    assert _CACHE.search(loaded_log(fleet, MINILM)) is None
    line = cached(estimated(fleet, MINILM))
    assert (line["total_mb"], line["how"]) == (0, "none: encoders have no KV cache")
