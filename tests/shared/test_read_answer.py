"""What `read_answer` makes of neurons' answers that do not read as expected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from shared.protocol import Discovery, EndpointReply, LoadCommand, LoadReply, ModelView, NeuronHealth, read_answer

LOADED = {"id": "m", "status": "loaded"}
LINK = {"a": 0, "b": 1, "kind": "nvlink"}


@pytest.mark.parametrize(
    ("wanted", "data", "readable", "ignored"),
    [
        # a field of another type
        (
            NeuronHealth,
            {"activation": {"state": "ready", "failed": []}},
            {"activation": {"state": "ready"}},
            ["activation.failed"],
        ),
        (NeuronHealth, {"activation": {"failed": {"m": {"why": 1}}}}, {"activation": {}}, ["activation.failed"]),
        (NeuronHealth, {"activation": "ready", "models": 3}, {}, ["activation", "models"]),
        (NeuronHealth, {"uptime_secs": "a while"}, {}, ["uptime_secs"]),
        (NeuronHealth, {"uptime_secs": 5, "instance_id": 7}, {"uptime_secs": 5}, ["instance_id"]),
        (
            Discovery,
            {"hostname": "h", "version": [1, 2], "simulated": "perhaps"},
            {"hostname": "h"},
            ["simulated", "version"],
        ),
        (
            Discovery,
            {"cuda_version": [13], "harnesses": ["vllm", {}]},
            {"harnesses": ["vllm"]},
            ["cuda_version", "harnesses"],
        ),
        (ModelView, {**LOADED, "progress": 0.5, "cause": {}}, LOADED, ["cause", "progress"]),
        (ModelView, {**LOADED, "devices": "all", "vram_used_mb": "much"}, LOADED, ["devices", "vram_used_mb"]),
        (ModelView, {**LOADED, "endpoint": {"href": "http://x"}}, LOADED, ["endpoint.url"]),
        (EndpointReply, {"url": "http://x", "api_key": 7}, {"url": "http://x"}, ["api_key"]),
        (LoadReply, {"status": "loaded", "url": {"a": 1}}, {"status": "loaded"}, ["url"]),
        # nested
        (
            ModelView,
            {**LOADED, "progress": {"phase": "x", "fraction": "half"}},
            {**LOADED, "progress": {"phase": "x"}},
            ["progress.fraction"],
        ),
        (list[ModelView], [{**LOADED, "since": "now"}, LOADED], [LOADED, LOADED], ["since"]),
        # entries of lists beyond protocol v1, and an unknown enum value
        (
            Discovery,
            {"links": [LINK, {**LINK, "kind": "infinity-fabric"}, LINK]},
            {"links": [LINK, LINK]},
            ["links.kind"],
        ),
        (Discovery, {"links": [{**LINK, "nvlinks": "4x"}]}, {"links": [LINK]}, ["links.nvlinks"]),
        (
            NeuronHealth,
            {"models": [{"in_flight": 1}, 7, {"id": "m", "in_flight": "few"}]},
            {"models": [{"id": "m"}]},
            ["models", "models.id", "models.in_flight"],
        ),
        # missing and odd figures of devices
        (NeuronHealth, {"devices": [{"index": 0}]}, {"devices": [{"index": 0}]}, []),
        (
            NeuronHealth,
            {"devices": [{"index": 0, "temp_c": "hot", "power_w": {}}]},
            {"devices": [{"index": 0}]},
            ["devices.power_w", "devices.temp_c"],
        ),
        (
            NeuronHealth,
            {"devices": [{"index": 0, "vram_used_mb": float("nan")}]},
            {"devices": [{"index": 0}]},
            ["devices.vram_used_mb"],
        ),
        # numbers that are not finite
        (
            ModelView,
            {**LOADED, "since": float("nan"), "progress": {"elapsed_secs": float("-inf"), "remaining_secs": "1e999"}},
            {**LOADED, "progress": {}},
            ["progress.elapsed_secs", "progress.remaining_secs", "since"],
        ),
        # floats for whole numbers, and null
        (
            NeuronHealth,
            {"devices": [{"index": 0.0, "vram_free_mb": 9.7, "temp_c": None}]},
            {"devices": [{"index": 0, "vram_free_mb": 10}]},
            [],
        ),
        (
            ModelView,
            {**LOADED, "devices": [0.0, 1.0], "tensor_parallel": 2.0},
            {**LOADED, "devices": [0, 1], "tensor_parallel": 2},
            [],
        ),
        (ModelView, {**LOADED, "devices": None, "progress": None, "harness": None}, LOADED, []),
        (NeuronHealth, {"devices": None, "models": None, "activation": {"failed": None}}, {"activation": {}}, []),
        (Discovery, {"devices": None, "harnesses": None, "links": None, "os": None}, {}, []),
    ],
)
def test_a_field_that_does_not_read_as_expected_counts_as_absent(
    wanted: Any, data: Any, readable: Any, ignored: list[str]
) -> None:
    """The rest of the answer counts, the caller hears what was left out, and the answer itself stays as it is."""
    before = copy.deepcopy(data)
    answer, left_out = read_answer(wanted, data)
    assert answer == read_answer(wanted, readable)[0]
    assert sorted(left_out) == ignored
    assert all(left_out.values())
    assert repr(data) == repr(before)


@pytest.mark.parametrize(
    ("wanted", "data"),
    [
        (NeuronHealth, []),
        (NeuronHealth, {"devices": 2}),
        (NeuronHealth, {"devices": [{"vram_free_mb": 1}], "activation": 5}),
        (Discovery, {"devices": [{"index": "first"}]}),
        (Discovery, {"devices": ["GPU"]}),
        (list[ModelView], {"models": []}),
        (list[ModelView], [LOADED, {"id": "n"}]),
        (list[ModelView], [{"id": "m", "status": None}]),
        (EndpointReply, {"api_key": "k"}),
    ],
)
def test_what_protocol_v1_requires_stays_required(wanted: Any, data: Any) -> None:
    """A device without an index or a model without a status must not silently be missing from the fleet."""
    with pytest.raises(ValidationError):
        read_answer(wanted, data)


@pytest.mark.parametrize("field", ["devices", "vram_mb", "args", "tools"])
def test_requests_are_read_strictly(field: str) -> None:
    """The sender of a request is told of a mistake in it."""
    with pytest.raises(ValidationError):
        LoadCommand.model_validate({"model_id": "m", field: {"a": 1}})
