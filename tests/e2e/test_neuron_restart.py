"""A neuron is replaced or killed while clients send requests through cortex: no request is dropped."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.cortex.cortex_process import CortexProcess, cortex_process, neuron_at
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, toml_config, until
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/model"
EVERY_SECS = 0.05
POLL_SECS = 2.0
UNHEALTHY_AFTER = 30
"""By default a neuron has three misses, six seconds, to return; on a busy machine its start alone takes longer."""


async def ask(session: aiohttp.ClientSession, url: str, *, stream: bool) -> str | None:
    """What was wrong with one request; None if nothing."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 15, "stream": stream}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
    whole = text.rstrip().endswith("[DONE]") if stream else "choices" in json.loads(text)
    return None if response.status == 200 and whole else f"{response.status} {text[-300:]}"


async def keep_asking(session: aiohttp.ClientSession, url: str, enough: asyncio.Event) -> list[str | None]:
    """Sends a plain request and a stream repeatedly, without waiting for the previous ones."""
    asked = []
    while not enough.is_set():
        asked += [asyncio.create_task(ask(session, url, stream=stream)) for stream in (True, False)]
        await asyncio.sleep(EVERY_SECS)  # paces the load
    return await asyncio.gather(*asked)


async def adopted(neuron: NeuronProcess, pid: int, cortex: CortexProcess) -> bool:
    """Whether it has adopted its engine and cortex reaches it."""
    entry = await neuron.model(MODEL)
    async with neuron.session.get(f"{cortex.url}/fleet") as response:
        [node] = (await response.json())["nodes"]
    return bool(entry and entry["status"] == "loaded" and entry["pid"] == pid and not node["last_error"])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_no_request_is_dropped(mark: str, tmp_path: Path, end: signal.Signals) -> None:
    """Under load, three times: a restart that leaves engines, as with `systemctl restart`, and a kill -9."""
    port = free_port()
    lines = (f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"', 'on_stop = "leave_engines"')
    config = toml_config(tmp_path, *lines)
    models = [{"id": MODEL, "harness": "sim", "vram_mb": 4000, "args": ["--tokens-per-sec", "30"]}]
    enough = asyncio.Event()
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        neuron_process(config) as first,
        cortex_process(
            tmp_path, [neuron_at(port)], models, poll_secs=POLL_SECS, unhealthy_after=UNHEALTHY_AFTER
        ) as cortex,
    ):
        assert await ask(session, cortex.url, stream=False) is None
        pid = (await first.model(MODEL))["pid"]
        asking = asyncio.create_task(keep_asking(session, cortex.url, enough))
        assert await first.stop(end) == (0 if end == signal.SIGTERM else -end)
        for _ in range(2):
            async with neuron_process(config) as next_one:
                await until(lambda neuron=next_one: adopted(neuron, pid, cortex))
                await next_one.stop(end)
        config.write_text(config.read_text().replace("leave_engines", "stop_engines"))
        async with neuron_process(config) as last:
            await until(lambda: adopted(last, pid, cortex))
            enough.set()
            answers = await asking
            assert [answer for answer in answers if answer is not None] == []
            assert len(answers) > 20
            assert await last.stop() == 0
