"""What cortex keeps of a neuron's refusal."""

from __future__ import annotations

import contextlib

import pytest

from cortex.config.neurons import NeuronEntry
from cortex.fleet.neuron_client import IDLE_SECS, NeuronClient, NeuronRefused, NeuronUnreachable
from cortex.upstream.pool import EnginePool
from shared.protocol import DeviceFigures, LoadCommand
from tests.cortex.protocol_v1_neuron import V1Neuron

COMMAND = LoadCommand(model_id="m", harness="vllm")


async def refused(neuron: V1Neuron) -> NeuronRefused:
    with contextlib.closing(EnginePool(IDLE_SECS)) as pool:
        client = NeuronClient(NeuronEntry(name=neuron.name, endpoint=neuron.url), pool)
        with pytest.raises(NeuronRefused) as caught:
            await client.load(COMMAND, timeout_secs=5)
    return caught.value


async def test_cause_and_figures_are_kept(benjy: V1Neuron) -> None:
    """The planner decides by them whether to try another node."""
    figures = {"index": 0, "total_mb": 24000, "booked_mb": 20000, "foreign_mb": 0, "bookable_mb": 4000}
    error = {"message": "no room", "code": "insufficient_vram", "cause": "node", "devices": [figures]}
    benjy.load_error = (409, {"error": error})
    found = await refused(benjy)
    assert (found.status, found.code, found.cause) == (409, "insufficient_vram", "node")
    assert found.devices == (DeviceFigures(**figures),)


@pytest.mark.parametrize(
    "error",
    [
        {"error": "text"},
        {"error": {"message": "text"}},
        {"error": {"message": "text", "cause": None, "devices": None}},
        {"error": {"message": "text", "cause": {"a": 1}, "devices": [{"no": "index"}]}},
    ],
)
async def test_an_error_without_cause_and_figures(benjy: V1Neuron, error: object) -> None:
    """Protocol v1 errors and malformed device figures still yield the refusal."""
    benjy.load_error = (500, error)
    found = await refused(benjy)
    assert (found.message, found.code, found.cause, found.devices) == ("text", None, None, ())


async def test_a_neuron_that_does_not_listen() -> None:
    """A refused connection is a neuron out of reach, for calls and for events: polls count it, loads go elsewhere."""
    with contextlib.closing(EnginePool(IDLE_SECS)) as pool:
        client = NeuronClient(NeuronEntry(name="n", endpoint="http://127.0.0.1:1"), pool)
        with pytest.raises(NeuronUnreachable):
            await client.health()
        with pytest.raises(NeuronUnreachable):
            await client.load(COMMAND, timeout_secs=5)
        with pytest.raises(NeuronUnreachable):
            await client.listen(lambda *_: None)
