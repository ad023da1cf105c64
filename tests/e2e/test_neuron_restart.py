"""A neuron is replaced, or dies, under a cortex with clients: none of their requests is dropped."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, toml_config, until
from tests.neuron.sim_process import free_port

__all__ = ["mark"]

MODEL = "org/model"
EVERY_SECS = 0.05
POLL_SECS = 2.0
"""The default: with three misses a neuron counts as away, so it has six seconds to come back."""


class Neuron:
    """A neuron as cortex is told of it: a name and an address, whatever process is behind it."""

    name = "n"

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"


async def ask(session: aiohttp.ClientSession, url: str, *, stream: bool) -> str | None:
    """What was wrong with one request, None when nothing was."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": 15, "stream": stream}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
    whole = text.rstrip().endswith("[DONE]") if stream else "choices" in json.loads(text)
    return None if response.status == 200 and whole else f"{response.status} {text[-300:]}"


async def keep_asking(session: aiohttp.ClientSession, url: str, enough: asyncio.Event) -> list[str | None]:
    """A plain request and a stream, again and again, without waiting for the last ones."""
    asked = []
    while not enough.is_set():
        asked += [asyncio.create_task(ask(session, url, stream=stream)) for stream in (True, False)]
        await asyncio.sleep(EVERY_SECS)  # the pace of the load, not a wait for something
    return await asyncio.gather(*asked)


async def adopted(neuron: NeuronProcess, pid: int, cortex: CortexProcess) -> bool:
    """It has the engine of before, and cortex has seen that it is back."""
    entry = await neuron.model(MODEL)
    async with neuron.session.get(f"{cortex.url}/fleet") as response:
        [node] = (await response.json())["nodes"]
    return bool(entry and entry["status"] == "loaded" and entry["pid"] == pid and not node["last_error"])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_no_request_is_dropped(mark: str, tmp_path: Path, end: signal.Signals) -> None:
    """A restart that leaves engines, as `systemctl restart` does it, and a kill -9: three times, under load."""
    port = free_port()
    lines = (f"port = {port}", f'state_dir = "{tmp_path / "state"}"', 'name = "n"', 'on_stop = "leave_engines"')
    config = toml_config(tmp_path, *lines)
    models = [{"id": MODEL, "harness": "sim", "vram_mb": 4000, "args": ["--tokens-per-sec", "30"]}]
    enough = asyncio.Event()
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        neuron_process(config) as first,
        cortex_process(tmp_path, [Neuron(port)], models, poll_secs=POLL_SECS) as cortex,
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
