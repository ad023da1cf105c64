"""Simulated engines on several hosts: their processes meet before the load, and what is left after one is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.neuron.sim_process import FAST, SimProcess, started_engine
from tests.ports import free_port


@contextlib.asynccontextmanager
async def pair(*args: str) -> AsyncIterator[tuple[SimProcess, SimProcess]]:
    nodes = ["--nnodes", "2", "-tp", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *args]
    async with (
        started_engine(*nodes, "--node-rank", "0") as leader,
        started_engine(*nodes, "--node-rank", "1", "--headless") as other,
    ):
        yield leader, other


async def ask(engine: SimProcess) -> int:
    body = {"prompt": "hi", "max_tokens": 3}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as session,
        session.post(f"{engine.url}/v1/completions", json=body) as answer,
    ):
        return answer.status


async def test_rank_0_serves_when_all_parts_have_loaded() -> None:
    """The other part has no server, and rank 0 does not load before it is there."""
    nodes = ["--nnodes", "2", "-tp", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), *FAST]
    async with started_engine(*nodes, "--node-rank", "0") as leader:
        await leader.printed("world_size=2 rank=0")
        assert not any("Starting to load model" in line for line in leader.lines)
        async with started_engine(*nodes, "--node-rank", "1", "--headless") as other:
            await leader.ready()
            assert await ask(leader) == 200
            with pytest.raises(aiohttp.ClientConnectorError):
                await ask(other)
            assert any("Loading weights took" in line for line in other.lines)


async def test_a_lost_part_is_not_noticed() -> None:
    """As with vLLM 0.32 when a host loses power: the leader stays healthy and does not answer any more."""
    async with pair(*FAST) as (leader, other):
        await leader.ready()
        os.killpg(other.pid, signal.SIGKILL)
        await other.ended()
        with pytest.raises(asyncio.TimeoutError):
            await ask(leader)
        async with aiohttp.ClientSession() as session, session.get(leader.url + "/health") as health:
            assert health.status == 200


async def test_a_lost_leader_is_not_noticed_either() -> None:
    async with pair(*FAST) as (leader, other):
        await leader.ready()
        os.killpg(leader.pid, signal.SIGKILL)
        await leader.ended()
        with pytest.raises(asyncio.TimeoutError):
            await other.ended(timeout_secs=0.5)
        other.send(signal.SIGTERM)
        assert await other.ended() == 0


async def test_a_part_that_is_lost_during_the_load_ends_it() -> None:
    async with pair("--load-secs", "30") as (leader, other):
        await leader.printed("Starting to load model")
        os.killpg(other.pid, signal.SIGKILL)
        assert await leader.ended(timeout_secs=5) == 1
        assert any("Connection closed by peer" in line for line in leader.lines)
