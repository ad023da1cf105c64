"""Requests generated from `/openapi.json`, valid and invalid ones, against a running fleet."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from cortex.api.openapi import OPERATIONS, openapi_document
from tests.e2e.dev import Dev

STREAMS = {("GET", "/fleet/events")}  # never end
MODELS = ["Qwen/Qwen3.6-27B", "no/such-model"]
EXPECTED_ABOVE_500 = {"cold_load_failed", "neuron_unavailable", "database_unavailable"}
"""Codes of a fleet that cannot do what was asked, not of a fault in cortex."""
EXAMPLES = 15


def modes_of(method: str, path: str) -> list[GenerationMode]:
    """Without a body or a parameter a request cannot be invalid."""
    operation = OPERATIONS[method, path]
    can_be_invalid = operation.body is not None or operation.query
    return [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if can_be_invalid else [GenerationMode.POSITIVE]


def test_description_is_complete(dev: Dev) -> None:
    """cortex serves the document that is generated from the route table."""
    served = schemathesis.openapi.from_url(f"{dev.url}/openapi.json", wait_for_schema=5)
    assert served.raw_schema == openapi_document()


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*route, mode) for route in sorted(OPERATIONS.keys() - STREAMS) for mode in modes_of(*route)],
)
def test_no_generated_request_finds_an_internal_error(dev: Dev, method: str, path: str, mode: GenerationMode) -> None:
    """Every answer is one that clients can handle: below 500, or an expected code above; always with a request id."""
    document = openapi_document()
    _use_known_models(document)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = dev.url
    operation = schema[path][method]
    cases = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def check(case: Any) -> None:
        answer = case.call(base_url=dev.url, timeout=30)
        expected = answer.status_code < 500 or any(f'"{code}"' in answer.text for code in EXPECTED_ABOVE_500)
        assert expected, (case.as_curl_command(), answer.text)
        assert "x-request-id" in answer.headers, case.as_curl_command()

    check()


def _use_known_models(document: dict[str, Any]) -> None:
    """Random model ids would all end in the same 404."""
    for methods in document["paths"].values():
        for operation in methods.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                media["schema"]["properties"]["model"] = {"enum": MODELS}
