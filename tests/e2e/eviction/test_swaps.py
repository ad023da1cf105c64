"""Two models by turns on one card: how long an exchange takes beside the engines' own start and stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from neuron.engine.connections import QUIET_SECS
from tests.e2e.eviction.test_eviction import fleet_of, model
from tests.neuron.conftest import mark
from tests.neuron.neurons import until
from tests.ports import free_port

__all__ = ["mark"]

pytestmark = pytest.mark.usefixtures("mark")

EXCHANGES = 6
SHARE_SECS = QUIET_SECS / 2
"""An exchange takes at least QUIET_SECS longer when the engine looks busy. `make bench-cold` measures the rest."""
FAULTS = {"figures": [], **{name: ["--fault", name] for name in ("no-metrics", "bare-metrics", "hanging-metrics")}}


async def own_secs(directory: Path) -> float:
    """How long an engine takes by hand to start, to answer one request, and to stop."""
    port = free_port()
    began = time.monotonic()
    with (directory / "by_hand.log").open("wb") as log:
        engine = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "neuron.sim", "serve", "a", "--port", str(port), "--load-secs", "0.2"),
            stdout=log,
            stderr=log,
        )
    async with aiohttp.ClientSession() as http:

        async def serves() -> bool:
            try:
                async with http.get(f"http://127.0.0.1:{port}/health") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        await until(serves)
        body = {"model": "a", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
            await answer.read()
    engine.send_signal(signal.SIGTERM)
    await engine.wait()
    return time.monotonic() - began


def turns(*args: str) -> list[dict[str, Any]]:
    return [model(name, args=["--tokens-per-sec", "100", *args]) for name in ("a", "b")]


@pytest.mark.parametrize("args", FAULTS.values(), ids=FAULTS)
async def test_exchanges_take_little_more_than_the_engines(tmp_path: Path, args: list[str]) -> None:
    """With request figures, and without: cortex's own idle connections do not make an engine look busy."""
    async with fleet_of(tmp_path, turns(*args)) as fleet:
        own, took = [], []
        for number in range(EXCHANGES + 1):
            began = time.monotonic()
            status, text, _ = await fleet.ask("ab"[number % 2], stream=number % 3 == 0)
            took.append(time.monotonic() - began)
            assert status == 200, text
            if number % 2:
                own.append(await own_secs(tmp_path))  # at the same time, as other programs slow the host down
        exchanges = took[1:]  # the first was no exchange
        # The fastest: on a busy host any may take longer, by hand too.
        assert min(exchanges) < min(own) + SHARE_SECS, (own, took)
        assert "stops later" not in fleet.neurons[0].log.read_text()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("args", FAULTS.values(), ids=FAULTS)
async def test_answers_of_other_clients_are_not_cut(tmp_path: Path, args: list[str], *, stream: bool) -> None:
    """A client that goes to the engine directly has a request there when its model is evicted. Meanwhile `explain`
    says what the swap waits for, and that does not count as time that the next load is expected to take."""
    async with fleet_of(tmp_path, turns(*args), placement={"min_residency_secs": 0}) as fleet:
        await fleet.well("a")
        found = (await fleet.neurons[0].endpoint("a")).body
        headers = {"Authorization": f"Bearer {found['api_key']}"}
        body = {"model": "a", "prompt": "x", "max_tokens": 150, "ignore_eos": True, "stream": stream}

        async def other() -> tuple[str, float]:
            async with (
                aiohttp.ClientSession(headers=headers) as http,
                http.post(f"{found['url']}/v1/completions", json=body) as answer,
            ):
                return await answer.text(), time.monotonic()

        async def waits() -> bool:
            decision = (await fleet.get("/fleet/explain?model=b"))["decision"]
            return "a has " in decision["reason"]  # perhaps one more connection, which cortex is about to close

        direct = asyncio.create_task(other())
        await asyncio.sleep(0.2)  # it is on its way; nothing tells when the engine has it
        began = time.monotonic()
        asking = asyncio.create_task(fleet.well("b"))
        await until(waits)
        assert not direct.done()
        text, ended_at = await direct
        assert text.rstrip().endswith("[DONE]") if stream else text.rstrip().endswith("}")
        await asking
        assert time.monotonic() - ended_at < 5
        took = time.monotonic() - began
        await fleet.well("a")
        explained = await fleet.get("/fleet/explain?model=b")
        assert 0 < explained["decision"]["expected_load_secs"] < took - (ended_at - began) + 0.3
