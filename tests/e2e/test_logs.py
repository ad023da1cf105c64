"""`GET /fleet/logs`: an operator reads what engines write without access to their hosts."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.services import NODE, Fleet, running_fleet

MODEL = "org/m"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    neuron = {"harnesses": [{"name": "sim"}], "simulate": {"devices": ["RTX 4090"]}}
    models = [{"id": MODEL, "harness": "sim", "vram_mb": 4000}, {"id": "org/never", "harness": "sim"}]
    catalogue = {"models": models, "aliases": {"short": MODEL}}
    with running_fleet(tmp_path_factory.mktemp("fleet"), neuron, {}, catalogue) as fleet:
        assert fleet.cortex.request("/fleet/load", {"model": MODEL}).status == 200
        yield fleet


def test_last_lines(fleet: Fleet) -> None:
    answer = fleet.cortex.request("/fleet/logs?model=short&tail=3")
    assert answer.status == 200
    (engine,) = answer.body["engines"]
    assert (engine["model"], engine["node"], len(engine["lines"])) == (MODEL, NODE, 3)
    assert fleet.cortex.request(f"/fleet/logs?model=short&node={NODE}&tail=0").body["engines"][0]["lines"] == []


def test_followed_until_the_engine_is_gone(fleet: Fleet) -> None:
    """The last lines, then each new one."""
    request = urllib.request.Request(f"{fleet.cortex.url}/fleet/logs?model=short&follow=true&tail=2")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["content-type"] == "text/event-stream"
        seen = [next_event(response), next_event(response)]
        assert all(event["node"] == NODE and event["line"] for event in seen)
        assert fleet.unload(MODEL).status == 200
        while "end" not in (event := next_event(response)):
            assert event["line"]
        assert event["end"] == "the engine is gone"
        assert response.read().strip() == b""
    assert fleet.cortex.request("/fleet/load", {"model": MODEL}).status == 200


def next_event(response: Any) -> dict[str, Any]:
    for line in response:
        if line.startswith(b"data: "):
            event: dict[str, Any] = json.loads(line[6:])
            return event
    raise AssertionError("the stream has ended")


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("", 400, "the query parameter 'model' is required"),
        ("?model=org/nope", 404, "does not exist"),
        ("?model=org/never", 404, "no neuron has had an engine of 'org/never'"),
        ("?model=short&node=nowhere", 404, "no neuron has had an engine of 'org/m' on nowhere"),
        ("?model=short&instance=9", 404, "as instance '9'"),
        ("?model=short&tail=-1", 400, "must be an integer from 0 to 10000"),
        ("?model=short&follow=yes", 400, "can be true or false"),
    ],
)
def test_odd_questions(fleet: Fleet, query: str, status: int, message: str) -> None:
    answer = fleet.cortex.request(f"/fleet/logs{query}")
    assert answer.status == status
    assert message in answer.body["error"]["message"]


def test_a_neuron_that_does_not_answer(fleet: Fleet) -> None:
    """The answer says so for its engines."""
    os.kill(fleet.neuron.pid, signal.SIGSTOP)
    try:
        (engine,) = fleet.cortex.request("/fleet/logs?model=short").body["engines"]
    finally:
        os.kill(fleet.neuron.pid, signal.SIGCONT)
    assert engine["lines"] == []
    assert "logs" in engine["error"]
