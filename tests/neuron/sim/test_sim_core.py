"""The simulated engine's core dies, survives and holds memory like vLLM's; and the faults that signals cause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from neuron.gpu import simulated_vram as vram
from neuron.sim.process.leftovers import SHARED_MEMORY
from tests.neuron.sim_process import (
    FAST,
    SimProcess,
    core_of,
    memory_environment,
    ready_engine,
    started_engine,
    until,
)

ENDLESS = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30000, "ignore_eos": True}
GENERATED = "vllm:generation_tokens_total"
SLOW = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "50")


def directory_of(path: Path) -> list[Path]:
    return list(path.iterdir())


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


async def figure(session: aiohttp.ClientSession, engine: SimProcess, name: str) -> float:
    """One value of the engine's metrics."""
    async with session.get(engine.url + "/metrics") as response:
        found = re.search(rf"^{re.escape(name)}{{.*}} (\S+)$", await response.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


async def status(session: aiohttp.ClientSession, engine: SimProcess) -> int:
    async with session.get(engine.url + "/health") as response:
        return response.status


async def above(session: aiohttp.ClientSession, engine: SimProcess, name: str, least: float) -> bool:
    return await figure(session, engine, name) > least


async def unhealthy(session: aiohttp.ClientSession, engine: SimProcess) -> bool:
    return await status(session, engine) == 503


@contextlib.asynccontextmanager
async def busy(
    engine: SimProcess, session: aiohttp.ClientSession
) -> AsyncIterator[asyncio.Task[aiohttp.ClientResponse]]:
    """A request that is generating tokens during the body."""
    request = asyncio.create_task(session.post(engine.url + "/v1/chat/completions", json=ENDLESS))
    await until(lambda: above(session, engine, GENERATED, 0))
    try:
        yield request
    finally:
        request.cancel()
        await asyncio.wait([request])


async def test_the_core_is_a_child_that_can_be_recognised() -> None:
    """Title and name as vLLM sets them, the engine's session, and the environment still readable."""
    async with ready_engine(*FAST, env={"NEURON_ENGINE_ID": "here/7"}) as engine:
        core = Path(f"/proc/{core_of(engine.pid)}")
        assert (core / "comm").read_text().strip() == "VLLM::EngineCor"
        assert b"NEURON_ENGINE_ID=here/7" in (core / "environ").read_bytes().split(b"\0")
        assert os.getsid(int(core.name)) == engine.pid


async def test_a_killed_server_leaves_its_core_with_all_the_memory(tmp_path: Path) -> None:
    """Only killing the core frees the memory; the port is free at once."""
    env = memory_environment(tmp_path, 4096)
    async with ready_engine(*FAST, "--vram-mb", "3000", env=env) as engine:
        core = core_of(engine.pid)
        engine.send(signal.SIGKILL)
        assert await engine.ended() == -signal.SIGKILL
        assert vram.usage_by_process(tmp_path) == {core: {"GPU-0": 3000}}
        async with ready_engine(*FAST, port=engine.port):
            assert vram.process_start_ticks(core) is not None
        os.kill(core, signal.SIGKILL)
        await until(lambda: not vram.usage_by_process(tmp_path))


async def test_a_server_exits_after_its_core(tmp_path: Path) -> None:
    """/health is 503 at once, running requests get a 500 with the reason, memory is free, the server exits with 0."""
    env = memory_environment(tmp_path, 4096)
    async with ready_engine(*SLOW, env=env) as engine, aiohttp.ClientSession() as session:
        async with busy(engine, session) as request:
            os.kill(core_of(engine.pid), signal.SIGKILL)
            answer = await asyncio.wait_for(request, 2)
            assert answer.status == 500
            assert "EngineCore encountered an issue" in (await answer.json())["error"]["message"]
        assert not vram.usage_by_process(tmp_path)
        assert await status(session, engine) == 503
        assert await engine.ended(timeout_secs=3) == 0
        await engine.printed("EngineDeadError")


async def test_a_core_killed_while_loading_fails_the_load() -> None:
    async with started_engine("--load-secs", "6") as engine:
        await engine.printed("Starting to load model")
        os.kill(core_of(engine.pid), signal.SIGKILL)
        assert await engine.ended(timeout_secs=2) == 1
        await engine.printed("RuntimeError: Engine core initialization failed.")


@pytest.mark.parametrize("moment", ["at once", "loading", "ready"])
async def test_sigterm_ends_the_core_too(moment: str) -> None:
    async with started_engine("--load-secs", "0" if moment == "ready" else "60") as engine:
        session = engine.pid
        if moment == "loading":
            await engine.printed("Resolved architecture")
        elif moment == "ready":
            await engine.ready()
        else:
            await until(lambda: Path(f"/proc/{session}/task/{session}/children").read_text() != "")
        engine.send(signal.SIGTERM)
        await engine.ended(timeout_secs=3)
        with pytest.raises(ProcessLookupError):
            os.killpg(session, 0)


async def test_a_stopped_core_makes_no_tokens_until_it_goes_on() -> None:
    """After SIGSTOP /health stays 200, requests stay running and counters do not move."""
    async with ready_engine(*SLOW) as engine, aiohttp.ClientSession() as session, busy(engine, session):
        os.kill(core_of(engine.pid), signal.SIGSTOP)
        await generation_stalls(session, engine)
        os.kill(core_of(engine.pid), signal.SIGCONT)
        before = await figure(session, engine, GENERATED)
        await until(lambda: above(session, engine, GENERATED, before))


async def generation_stalls(session: aiohttp.ClientSession, engine: SimProcess) -> None:
    """Waits until no more tokens are generated; the engine is healthy and its request running."""
    before = -1.0
    while (now := await figure(session, engine, GENERATED)) != before:
        before = now
        await asyncio.sleep(0.1)  # five tokens
    assert await status(session, engine) == 200
    assert await figure(session, engine, "vllm:num_requests_running") == 1


async def test_sigusr1_hangs_it_and_sigterm_still_works() -> None:
    async with ready_engine(*SLOW) as engine, aiohttp.ClientSession() as session, busy(engine, session):
        engine.send(signal.SIGUSR1)
        await generation_stalls(session, engine)
        engine.send(signal.SIGTERM)
        assert await engine.ended(timeout_secs=3) == 0


async def test_sigusr2_makes_it_unhealthy_and_nothing_else() -> None:
    async with ready_engine(*FAST) as engine, aiohttp.ClientSession() as session:
        engine.send(signal.SIGUSR2)
        await until(lambda: unhealthy(session, engine))
        async with session.post(engine.url + "/v1/chat/completions", json={**ENDLESS, "max_tokens": 3}) as response:
            assert response.status == 200


async def test_fault_slow_prefill_counts_nothing_until_the_first_token() -> None:
    arguments = (*FAST, "--fault", "slow-prefill", "--fault-after", "0.5")
    async with ready_engine(*arguments) as engine, aiohttp.ClientSession() as session:
        request = asyncio.create_task(
            session.post(engine.url + "/v1/chat/completions", json={**ENDLESS, "max_tokens": 3})
        )
        await until(lambda: above(session, engine, "vllm:num_requests_running", 0))
        assert await figure(session, engine, "vllm:prompt_tokens_total") == 0
        assert (await request).status == 200
        assert await figure(session, engine, "vllm:prompt_tokens_total") > 0


async def test_fault_lose_early_sigterm() -> None:
    """A SIGTERM during the load is ignored; a later one works."""
    async with started_engine("--load-secs", "0.5", "--fault", "lose-early-sigterm") as engine:
        await engine.printed("Resolved architecture")
        engine.send(signal.SIGTERM)
        await engine.ready()
        engine.send(signal.SIGTERM)
        assert await engine.ended(timeout_secs=3) == 0


@pytest.mark.parametrize("orderly", [True, False])
async def test_fault_leave_files(orderly: bool, tmp_path: Path) -> None:
    """An orderly exit leaves the ranks' directory only; SIGKILL leaves everything. The core maps the shared files."""
    before = set(SHARED_MEMORY.iterdir())
    env = {"TMPDIR": str(tmp_path)}
    async with ready_engine(*FAST, "--fault", "leave-files", env=env) as engine:
        mapped = read(f"/proc/{core_of(engine.pid)}/maps")
        made = {path for path in set(SHARED_MEMORY.iterdir()) - before if path.name in mapped}
        assert sorted(path.name.rstrip("0123456789abcdef") for path in made) == ["psm_", "sem.mp-"]
        engine.send(signal.SIGTERM if orderly else signal.SIGKILL)
        await engine.ended(timeout_secs=3)
    left = [path.name for path in directory_of(tmp_path)]
    assert [name.startswith("vllm_dist_") for name in left] == [True] if orderly else len(left) == 2
    assert all(path.exists() is not orderly for path in made)
    for path in made:
        path.unlink(missing_ok=True)


async def test_a_core_costs_little() -> None:
    """A core takes a few private MiB: tests start hundreds of engines."""
    async with ready_engine(*FAST) as engine:
        rollup = read(f"/proc/{core_of(engine.pid)}/smaps_rollup")
        own_kib = sum(int(kib) for kib in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", rollup, re.MULTILINE))
        assert own_kib < 4 * 1024


async def test_a_taken_port_leaves_no_core() -> None:
    async with ready_engine(*FAST) as first, started_engine(*FAST, port=first.port) as second:
        assert await second.ended() == 1
        with pytest.raises(ProcessLookupError):
            os.killpg(second.pid, 0)
