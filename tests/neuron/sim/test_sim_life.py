"""The simulated engine as a process: load, readiness, memory, SIGTERM, and its faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from neuron.gpu import simulated_vram as vram
from tests.neuron.sim_process import (
    FAST,
    MODEL,
    SimProcess,
    children_of,
    core_of,
    memory_environment,
    ready_engine,
    started_engine,
    until,
)

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


async def stream(session: aiohttp.ClientSession, engine: SimProcess, tokens: int) -> aiohttp.ClientResponse:
    body = {**HELLO, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    return await session.post(engine.url + "/v1/chat/completions", json=body)


async def test_clients_are_refused_until_it_is_ready() -> None:
    """The port is bound early, but nothing listens before the load is finished."""
    async with started_engine("--load-secs", "0.6") as engine, aiohttp.ClientSession() as session:
        await engine.printed("Starting to load model")
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(engine.url + "/health")
        await engine.ready()
        assert any("Capturing CUDA graphs" in line for line in engine.lines)


async def test_the_load_prints_vllms_lines_in_order() -> None:
    async with ready_engine(*FAST) as engine:
        await engine.printed("Application startup complete.")
        markers = [
            "INFO", "Resolved architecture: Qwen3ForCausalLM", "Initializing a V1 LLM engine",
            f"Starting to load model {MODEL}...", "checkpoint shards:  25% Completed | 1/4",
            "checkpoint shards: 100% Completed | 4/4", "Loading weights took", "KV cache size", "CUDA graphs",
            "init engine (profile, create kv cache, warmup model) took", f"Starting vLLM server on {engine.url}",
            "Application startup complete.",
        ]  # fmt: skip
        places = [next(index for index, line in enumerate(engine.lines) if marker in line) for marker in markers]
        assert places == sorted(places)
        assert engine.lines[0].startswith(f"(APIServer pid={engine.pid}) INFO ")


async def test_a_wrong_command_line_exits_with_2_and_vllms_message() -> None:
    async with started_engine("--no-such-flag", "1") as engine:
        assert await engine.ended() == 2
        await engine.printed("error: unrecognized arguments: --no-such-flag 1")
    async with started_engine("--max-model-len", "banana") as engine:
        assert await engine.ended() == 2
        await engine.printed("argument --max-model-len: invalid human_readable_int_or_auto value: 'banana'")


async def test_a_taken_port_ends_it_with_the_reason_last() -> None:
    async with ready_engine(*FAST) as first, started_engine(*FAST, port=first.port) as second:
        assert await second.ended() == 1
        await second.printed("OSError: [Errno 98] Address already in use")
        assert second.lines[-1] == "OSError: [Errno 98] Address already in use"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_at_once_with_status_0(number: signal.Signals) -> None:
    async with ready_engine(*FAST) as engine:
        engine.send(number)
        assert await engine.ended(timeout_secs=2) == 0


async def test_sigterm_while_loading_ends_it_with_status_0() -> None:
    async with started_engine("--load-secs", "60") as engine:
        await engine.printed("Resolved architecture")
        engine.send(signal.SIGTERM)
        assert await engine.ended(timeout_secs=2) == 0


async def test_sigterm_aborts_running_requests() -> None:
    """Plain: 200 with finish_reason abort. Streamed: an error event, then [DONE]. Like vLLM."""
    slow = ("--load-secs", "0", "--ttft-ms", "0", "--tokens-per-sec", "10")
    async with ready_engine(*slow) as engine, aiohttp.ClientSession() as session:
        plain = asyncio.create_task(
            session.post(engine.url + "/v1/chat/completions", json={**HELLO, "max_tokens": 1000, "ignore_eos": True})
        )
        streamed = await stream(session, engine, 1000)
        await streamed.content.readany()
        engine.send(signal.SIGTERM)
        rest = (await streamed.content.read()).decode()
        answer = await (await plain).json()
        assert await engine.ended(timeout_secs=3) == 0
    assert '"code": 500' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert answer["choices"][0]["finish_reason"] == "abort"


async def test_memory_fills_up_evenly_and_is_free_after_the_end(tmp_path: Path) -> None:
    env = memory_environment(tmp_path, 4096, 4096)
    async with started_engine("--load-secs", "0.6", "--vram-mb", "3001", "-tp", "2", env=env) as engine:
        await engine.printed("1/4")
        partly = vram.used_mb(tmp_path)
        assert 0 < partly.total() < 3001
        await engine.ready()
        assert vram.usage_by_process(tmp_path) == {core_of(engine.pid): {"GPU-0": 1501, "GPU-1": 1500}}
        engine.send(signal.SIGTERM)
        await engine.ended()
        assert vram.used_mb(tmp_path).total() == 0


async def test_a_full_device_ends_the_load_with_the_root_cause_above_the_end(tmp_path: Path) -> None:
    """Another holder has most of the second device."""
    vram.hold(tmp_path, {"GPU-1": 3000})
    env = memory_environment(tmp_path, 4096, 4096)
    async with started_engine("--load-secs", "0", "--vram-mb", "4000", "-tp", "2", env=env) as engine:
        assert await engine.ended() == 1
        root = await engine.printed("torch.OutOfMemoryError")
        await engine.printed("Engine core initialization failed")
    assert re.match(r"\(EngineCore pid=\d+\) ERROR ", root)
    assert "GPU 1 has a total capacity of 4.00 GiB" in root
    assert engine.lines[-1].endswith("See root cause above. Failed core proc(s): {'EngineCore': 1}")
    assert vram.used_mb(tmp_path) == {"GPU-1": 3000}


async def test_two_engines_never_overfill_a_device_together(tmp_path: Path) -> None:
    """Both load at the same time and only one fits: exactly one becomes ready."""
    env = memory_environment(tmp_path, 4096)
    arguments = ("--load-secs", "0.3", "--vram-mb", "2500")
    async with started_engine(*arguments, env=env) as one, started_engine(*arguments, env=env) as other:
        ended = [asyncio.create_task(engine.ended(timeout_secs=30)) for engine in (one, other)]
        done, _ = await asyncio.wait(ended, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [1]
        await (other if one.process.returncode is not None else one).ready()
        assert vram.used_mb(tmp_path) == {"GPU-0": 2500}
        for task in ended:
            task.cancel()


async def test_fault_oom_at_load() -> None:
    """The simulation prints vLLM's out-of-memory lines and exits with 1."""
    async with started_engine("--load-secs", "0.2", "--fault", "oom-at-load") as engine:
        assert await engine.ended() == 1
        await engine.printed("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate")
        await engine.printed("RuntimeError: Engine core initialization failed. See root cause above.")
        assert not any("Application startup" in line for line in engine.lines)


async def test_fault_never_ready() -> None:
    """The load hangs at its end, the port stays closed, and SIGTERM still works."""
    async with (
        started_engine("--load-secs", "0", "--fault", "never-ready") as engine,
        aiohttp.ClientSession() as client,
    ):
        await engine.printed("Capturing CUDA graphs")
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(engine.url + "/health")
        engine.send(signal.SIGTERM)
        assert await engine.ended(timeout_secs=2) == 0


async def test_fault_die_mid_stream() -> None:
    """Plain answers are complete; a streamed one breaks off after N tokens, and the process is killed."""
    arguments = (*FAST, "--fault", "die-mid-stream", "--fault-after", "5")
    async with ready_engine(*arguments) as engine, aiohttp.ClientSession() as session:
        async with session.post(engine.url + "/v1/chat/completions", json=HELLO) as response:
            assert response.status == 200
        received = b""
        with contextlib.suppress(aiohttp.ClientPayloadError):
            async for data in (await stream(session, engine, 100)).content.iter_any():
                received += data
            pytest.fail("the stream ended as if it were whole")
        assert received.count(b"data: ") == 6
        assert await engine.ended() == -signal.SIGKILL


async def test_fault_hang() -> None:
    """The stream stops after N tokens while /health stays 200; SIGTERM still works."""
    arguments = (*FAST, "--fault", "hang", "--fault-after", "2")
    async with ready_engine(*arguments) as engine, aiohttp.ClientSession() as session:
        response = await stream(session, engine, 100)
        received = b""
        while received.count(b"\n\n") < 3:
            received += await response.content.readany()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.3)
        async with session.get(engine.url + "/health") as health:
            assert health.status == 200
        engine.send(signal.SIGTERM)
        assert await engine.ended(timeout_secs=3) == 0


async def test_fault_ignore_sigterm() -> None:
    """Only SIGKILL ends the engine."""
    async with ready_engine(*FAST, "--fault", "ignore-sigterm") as engine:
        engine.send(signal.SIGTERM)
        await engine.ready()
        with pytest.raises(asyncio.TimeoutError):
            await engine.ended(timeout_secs=0.3)
        engine.send(signal.SIGKILL)
        assert await engine.ended() == -signal.SIGKILL


async def test_fault_crash_after_secs_ends_with_status_0_like_vllm() -> None:
    async with ready_engine(*FAST, "--fault", "crash-after-secs", "--fault-after", "0.2") as engine:
        assert await engine.ended() == 0
        await engine.printed("EngineDeadError")


async def test_fault_spawn_child_leaves_a_child_that_ignores_sigterm() -> None:
    """The child is in the engine's session and group; only SIGKILL to the group ends it."""
    async with ready_engine(*FAST, "--fault", "spawn-child") as engine:
        [child] = set(children_of(engine.pid)) - {core_of(engine.pid)}
        os.killpg(engine.pid, signal.SIGTERM)
        assert await engine.ended(timeout_secs=3) == 0
        assert os.getsid(child) == os.getpgid(child) == engine.pid
        assert vram.process_start_ticks(child) is not None
        os.killpg(engine.pid, signal.SIGKILL)
        await until(lambda: vram.process_start_ticks(child) is None)


async def test_fault_bad_health_with_others() -> None:
    """Faults combine: healthy for N requests, then 503 while requests are still served."""
    arguments = (*FAST, "--fault", "bad-health", "--fault", "ignore-sigterm", "--fault-after", "2")
    async with ready_engine(*arguments) as engine, aiohttp.ClientSession() as session:
        seen = []
        for _ in range(3):
            async with session.get(engine.url + "/health") as health:
                seen.append(health.status)
            async with session.post(engine.url + "/v1/chat/completions", json=HELLO) as response:
                assert response.status == 200
        assert seen == [200, 200, 503]


async def test_it_starts_fast() -> None:
    """It imports nothing heavy: no pydantic, no prometheus_client, not the rest of neuron."""
    code = (
        "import sys, neuron.sim.process.lifecycle; "
        "print([name for name in sys.modules if name.split('.')[0] in ('pydantic', 'prometheus_client', 'msgspec')"
        " or name in ('neuron.config', 'neuron.gpu.topology')])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"
