"""A neuron whose state directory survives it, and a stream from one of its engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.neuron.neurons import Client, toml_config

MODEL = "org/model"


@pytest.fixture
def config(mark: str, tmp_path: Path) -> Path:
    """A neuron.toml with a state directory that survives the neuron."""
    return toml_config(tmp_path, "port = 0", f'state_dir = "{tmp_path / "state"}"', "drain_timeout_secs = 5")


def leaving(config: Path) -> Path:
    return rewritten(config, "", 'on_stop = "leave_engines"\n')


def rewritten(config: Path, old: str, new: str) -> Path:
    """Replaces the first `old` in the file; "" is its beginning."""
    config.write_text(config.read_text().replace(old, new, 1))
    return config


@contextlib.asynccontextmanager
async def streaming(neuron: Client, tokens: int) -> AsyncIterator[asyncio.Task[list[Any]]]:
    """A stream from the model's engine that has begun; the task returns its events."""
    found = (await neuron.endpoint(MODEL)).body
    body = {"model": MODEL, "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    began = asyncio.Event()

    async def read() -> list[Any]:
        events: list[Any] = []
        headers = {"Authorization": f"Bearer {found['api_key']}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{found['url']}/v1/completions", json=body) as response,
        ):
            async for line in response.content:
                if line.startswith(b"data: "):
                    events.append(line[6:].strip())
                    began.set()
        return events

    task = asyncio.create_task(read())
    await began.wait()
    yield task
    await task
