"""Finding and replacing `model`, and reading `usage`: bytes in, facts out."""

from __future__ import annotations

import json

import pytest

from cortex.neuron_client import reachable_url
from cortex.proxy.body import find_model
from cortex.proxy.usage import Usage, UsageTail, find_usage


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ('{"model": "a"}', "a"),
        (' \n{"x": [1, {"model": "no"}], "model":"a" }\r\n', "a"),
        ('{"messages": "\\"model\\": \\"no\\"", "model": "a"}', "a"),
        ('{"model": "first", "model": "a"}', "a"),  # as every parser of an engine takes it
        ('{"mod\\u0065l": "\\u0061"}', "a"),
        ('{"ä": "€😀", "model": "ö/😀"}', "ö/😀"),
        ('{"big": 123456789012345678901234567890, "f": 1e400, "model": "a"}', "a"),
    ],
)
def test_model_is_found_and_replaced_in_place(body: str, model: str) -> None:
    """And nothing else changes: parsed, the two bodies differ in `model` alone."""
    raw = body.encode()
    found = find_model(raw, "application/json")
    assert found.model == model
    replaced = found.replaced(raw, "new/ü")
    assert json.loads(replaced) == {**json.loads(raw), "model": "new/ü"}
    assert (replaced[: found.start], replaced[len(replaced) - (len(raw) - found.end) :]) == (
        raw[: found.start],
        raw[found.end :],
    )


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}', Usage(3, 5)),
        (b'data: {"usage": null}\n\ndata: {"usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\n', Usage(3, 5)),
        (b'data: {"type":"message_delta","usage":{"input_tokens":3,"output_tokens":5}}\n\n', Usage(3, 5)),
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":null}}', Usage(3, 0)),
        (b'{"data": []}', None),
        (b'"usage": {"broken', None),
        (b"\xff\xfe", None),
    ],
)
def test_usage_is_read_from_the_end(answer: bytes, usage: Usage | None) -> None:
    """OpenAI's and Anthropic's names; whatever is not usage is no error."""
    assert find_usage(answer) == usage


def test_usage_is_found_behind_a_long_answer_in_small_chunks() -> None:
    """The tail that is kept is bounded and still holds it."""
    tail = UsageTail()
    for _ in range(100_000):
        tail.feed(b"data: x\n\n")
    for byte in b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}':
        tail.feed(bytes([byte]))
    assert tail.usage() == Usage(3, 5)


@pytest.mark.parametrize(
    ("engine", "neuron", "expected"),
    [
        ("http://127.0.0.1:20000", "http://beast.internal:13131", "http://beast.internal:20000"),
        ("http://localhost:20000/", "http://10.0.0.1:13131", "http://10.0.0.1:20000"),
        ("http://0.0.0.0:20000/base", "http://10.0.0.1:13131", "http://10.0.0.1:20000/base"),
        ("http://[::1]:20000", "http://[fd00::1]:13131", "http://[fd00::1]:20000"),
        ("http://127.0.0.1:20000", "http://localhost:13131", "http://127.0.0.1:20000"),
        ("http://127.0.0.1:20000", "http://127.0.0.2:13131", "http://127.0.0.2:20000"),
        ("http://localhost:20000", "http://127.0.0.2:13131", "http://127.0.0.2:20000"),
        ("http://127.0.0.1:20000", "http://[::1]:13131", "http://127.0.0.1:20000"),
        ("http://0.0.0.0:20000", "http://127.0.0.1:13131", "http://127.0.0.1:20000"),
        ("http://other.host:20000", "http://10.0.0.1:13131", "http://other.host:20000"),
    ],
)
def test_loopback_of_a_neuron_is_the_neurons_host(engine: str, neuron: str, expected: str) -> None:
    """An engine's address is meant from the neuron's side."""
    assert reachable_url(engine, neuron) == expected
