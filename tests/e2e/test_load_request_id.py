"""The log lines of a load name the request that caused it, in cortex and in the neuron."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.eviction.test_eviction import SmallFleet, fleet_of, model
from tests.neuron.conftest import mark
from tests.neuron.neurons import until

__all__ = ["mark"]

pytestmark = pytest.mark.usefixtures("mark")

CORTEX = (" cortex.control.loads.loader: loading {} on ", " cortex.control.loads.loader: loaded {} ")
NEURON = (" neuron.lifecycle.launcher: {}: engine process ",)


def request_ids(log: Path, model_id: str, marks: tuple[str, ...]) -> list[str]:
    """The request ids of the lines with these marks, "" for a line without one."""
    lines = log.read_text(encoding="utf-8").splitlines()
    found = [next(line for line in lines if text.format(model_id) in line) for text in marks]
    return [line.rpartition(" id=")[2] if " id=" in line else "" for line in found]


async def ask(fleet: SmallFleet, name: str, request_id: str, *, tokens: int = 1) -> None:
    body = {"model": name, "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    headers = {"x-request-id": request_id}
    async with fleet.http.post(f"{fleet.url}/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()


async def until_shown(fleet: SmallFleet, field: str) -> None:
    async def shown() -> bool:
        return bool((await fleet.get("/fleet"))[field])

    await until(shown)


def assert_logged(fleet: SmallFleet, name: str, request_id: str) -> None:
    assert request_ids(fleet.log, name, CORTEX) == [request_id] * 2
    assert request_ids(fleet.neurons[0].log, name, NEURON) == [request_id]


async def test_a_load_logs_the_request_that_caused_it(tmp_path: Path) -> None:
    """The first of several requests; also when the load could not start while that request was being resolved."""
    placement = {"min_residency_secs": 0, "patience_secs": 0.3, "pause_secs": 0.1}
    async with fleet_of(tmp_path, [model("a"), model("b")], placement=placement) as fleet:
        await ask(fleet, "a", "abc")
        assert_logged(fleet, "a", "abc")
        busy = asyncio.create_task(ask(fleet, "a", "busy", tokens=100))  # one second
        await until_shown(fleet, "in_flight")
        waiting = [asyncio.create_task(ask(fleet, "b", "first"))]
        await until_shown(fleet, "waiting")
        waiting.append(asyncio.create_task(ask(fleet, "b", "second")))
        await asyncio.gather(busy, *waiting)
        assert_logged(fleet, "b", "first")


async def test_an_operators_load_logs_its_own_request(tmp_path: Path) -> None:
    """`POST /fleet/load` passes its request id on to the neuron's log."""
    async with fleet_of(tmp_path, [model("a")]) as fleet:
        body, headers = {"model": "a"}, {"x-request-id": "operator-1"}
        async with fleet.http.post(f"{fleet.url}/fleet/load", json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        assert_logged(fleet, "a", "operator-1")
