"""Energy in `/health` and `/metrics` of a neuron with simulated GPUs, over a kill of neuron."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.neuron.neurons import Client, neuron_process, toml_config, until


async def energy_of(client: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    """The health of the neuron, and the energy of its only instance."""
    health = (await client.call("GET", "/health")).body
    return health, next(iter(health["energy"]), {})


async def chat(client: Client, tokens: int) -> int:
    """A request straight to the engine."""
    engine = (await client.endpoint("m")).body
    url, headers = engine["url"], {"Authorization": f"Bearer {engine['api_key']}"}
    body = {"model": "m", "max_tokens": tokens, "ignore_eos": True, "messages": [{"role": "user", "content": "hello"}]}
    async with client.session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status


async def test_energy_of_an_engine_over_a_kill(tmp_path: Path) -> None:
    """A loaded engine has the idle draw, one with requests more, and a killed neuron goes on with the same counts."""
    config = toml_config(tmp_path, "port = 0", f'state_dir = "{tmp_path / "state"}"')
    async with neuron_process(config) as first:
        assert (await first.load("m", "--tokens-per-sec", "20")).status == 200

        async def grown() -> bool:
            return bool((await energy_of(first))[1].get("resident_wh"))

        await until(grown)
        request = asyncio.create_task(chat(first, 60))

        async def active() -> bool:
            return bool((await energy_of(first))[1]["active_wh"])

        await until(active)
        assert await request == 200
        health, mine = await energy_of(first)
        assert (mine["id"], mine["device"]) == ("m", 0)
        (device,) = health["devices"]
        assert 0 < mine["active_wh"] + mine["resident_wh"] <= device["energy_wh"] + 1e-6
        page = (await first.call("GET", "/metrics")).body
        assert "neuron_device_energy_joules_total{" in page
        assert 'neuron_model_energy_joules_total{kind="active",model="m"}' in page
        _ = await first.stop(signal.SIGKILL)
    async with neuron_process(config) as second:
        after, then = await energy_of(second)
        assert after["energy_epoch"] == health["energy_epoch"]
        assert after["devices"][0]["energy_wh"] >= device["energy_wh"]
        assert then["active_wh"] >= mine["active_wh"]
        assert after["instance_id"] != health["instance_id"]
        assert pytest.approx(60) == after["devices"][0]["power_w"]
