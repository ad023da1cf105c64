"""Sleep and wake, with the simulated engine and with engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from neuron.errors import GuardFailed, SleepFailed, SleepUnsettled, WakeFailed
from neuron.gpu import simulated_vram as vram
from neuron.harness.vllm.control import sleep_routes as sleeping
from neuron.harness.vllm.guard.neuron_guard import CONTROL_HEADER, DIGEST_VARIABLE, digest_of
from shared.errors import Conflict
from tests.neuron.neurons import until
from tests.neuron.sim.test_sim_life import HELLO
from tests.neuron.sim_process import FAST, SimProcess, core_of, memory_environment, ready_engine
from tests.ports import free_port

KEY = "a control key"
SLEEPER = {"VLLM_SERVER_DEV_MODE": "1", DIGEST_VARIABLE: digest_of(KEY)}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@contextlib.asynccontextmanager
async def strange_engine(answers: Mapping[str, web.Response | None]) -> AsyncIterator[str]:
    """The URL of a server that answers these paths whatever the key; None: it never answers. Other paths are 404."""

    async def handler(request: web.Request) -> web.Response:
        if request.path not in answers:
            return web.json_response({"detail": "Not Found"}, status=404)
        answer = answers[request.path]
        if answer is None:
            await asyncio.Event().wait()
            raise AssertionError
        return web.Response(status=answer.status, text=answer.text, content_type=answer.content_type)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def says_asleep(asleep: bool) -> web.Response:
    return web.json_response({"is_sleeping": asleep})


async def status_of(http: aiohttp.ClientSession, engine: SimProcess, path: str = CHAT) -> int:
    async with http.post(engine.url + path, json=HELLO) as response:
        return response.status


async def test_memory_goes_and_comes_back(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    """Asleep, an engine keeps at most a tenth of its memory on each device; awake it has all. Asking twice is fine."""
    env = {**SLEEPER, **memory_environment(tmp_path, 8192, 8192)}
    async with ready_engine(*FAST, "--vram-mb", "6000", "-tp", "2", "--wake-secs", "0", env=env) as engine:
        assert await sleeping.is_guarded(http, engine.url, KEY)
        assert await sleeping.is_sleeping(http, engine.url, KEY) is False
        for _ in range(2):
            await sleeping.sleep(http, engine.url, KEY)
            assert vram.usage_by_process(tmp_path) == {core_of(engine.pid): {"GPU-0": 300, "GPU-1": 300}}
        assert await sleeping.is_sleeping(http, engine.url, KEY) is True
        for _ in range(2):
            await sleeping.wake(http, engine.url, KEY)
            assert vram.usage_by_process(tmp_path) == {core_of(engine.pid): {"GPU-0": 3000, "GPU-1": 3000}}
        assert await sleeping.is_sleeping(http, engine.url, KEY) is False
        assert await status_of(http, engine) == 200
        assert not [line for line in engine.lines if KEY in line]


async def test_asleep_it_is_healthy_and_refuses_work(http: aiohttp.ClientSession) -> None:
    async with ready_engine(*FAST, env=SLEEPER) as engine:
        await sleeping.sleep(http, engine.url, KEY)
        async with http.post(engine.url + CHAT, json=HELLO) as response:
            assert (response.status, response.headers["x-neuron-sleeping"]) == (503, "1")
            assert (await response.json())["error"]["code"] == 503
        async with http.get(engine.url + "/health") as response:
            assert response.status == 200
        async with http.get(engine.url + "/metrics") as response:
            page = await response.text()
        assert 'sleep_state="weights_offloaded"} 1.0' in page
        assert 'sleep_state="awake"} 0.0' in page
        await sleeping.wake(http, engine.url, KEY)
        async with http.get(engine.url + "/metrics") as response:
            assert 'sleep_state="awake"} 1.0' in await response.text()


async def test_requests_are_finished_first(http: aiohttp.ClientSession) -> None:
    async with ready_engine("--load-secs", "0", "--ttft-ms", "300", "--tokens-per-sec", "inf", env=SLEEPER) as engine:
        running = asyncio.create_task(status_of(http, engine))

        async def counted() -> bool:
            async with http.get(engine.url + "/metrics") as response:
                return 'vllm:num_requests_running{engine="0",model_name="Qwen/Qwen3-8B"} 1.0' in await response.text()

        await until(counted)
        await sleeping.sleep(http, engine.url, KEY)
        assert running.done()
        assert await running == 200


async def test_taken_memory_keeps_it_asleep(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    """Another process uses the GPU: waking fails with an error, and succeeds when the memory is free again."""
    env = {**SLEEPER, **memory_environment(tmp_path, 8192)}
    async with ready_engine(*FAST, "--vram-mb", "6000", "--wake-secs", "0", env=env) as engine:
        await sleeping.sleep(http, engine.url, KEY)
        vram.hold(tmp_path, {"GPU-0": 5000})
        with pytest.raises(WakeFailed, match="out of memory"):
            await sleeping.wake(http, engine.url, KEY)
        assert await sleeping.is_sleeping(http, engine.url, KEY) is True
        assert vram.usage_by_process(tmp_path)[core_of(engine.pid)] == {"GPU-0": 400}
        vram.hold(tmp_path, {})
        await sleeping.wake(http, engine.url, KEY)
        assert await status_of(http, engine) == 200


async def test_only_the_key_opens_the_routes(http: aiohttp.ClientSession) -> None:
    """The simulation has a guard like vLLM's; its answers to clients do not change."""
    async with ready_engine(*FAST, env=SLEEPER) as engine:
        for headers in ({}, {CONTROL_HEADER: "another"}, {CONTROL_HEADER: digest_of(KEY)}):
            for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"), ("GET", "/sleep/")):
                async with http.request(method, engine.url + path, headers=headers) as response:
                    assert (response.status, await response.json()) == (404, {"detail": "Not Found"})
        for body in ("level=3", "mode=never"):
            async with http.post(f"{engine.url}/sleep?{body}", headers={CONTROL_HEADER: KEY}) as response:
                assert response.status == 400
        assert await status_of(http, engine) == 200


async def test_an_engine_without_sleep_mode(http: aiohttp.ClientSession) -> None:
    """neuron notices that the engine cannot sleep and answers sleep_unsupported."""
    async with ready_engine(*FAST, env={DIGEST_VARIABLE: digest_of(KEY)}) as engine:
        assert not await sleeping.is_guarded(http, engine.url, KEY)
        assert await sleeping.is_sleeping(http, engine.url, KEY) is None
        with pytest.raises(Conflict) as caught:
            await sleeping.sleep(http, engine.url, KEY)
        assert caught.value.code == "sleep_unsupported"


async def test_an_open_engine_is_found_out(http: aiohttp.ClientSession) -> None:
    """An engine whose guard was not loaded, for any reason, must not serve."""
    async with strange_engine({"/is_sleeping": says_asleep(False)}) as url:
        with pytest.raises(GuardFailed, match="/is_sleeping answered False"):
            await sleeping.is_guarded(http, url, KEY)


async def test_a_busy_engine_goes_on(http: aiohttp.ClientSession) -> None:
    """A 409 of the engine is model_busy, not a failure."""
    async with strange_engine({"/sleep": web.Response(status=409)}) as url:
        with pytest.raises(Conflict) as caught:
            await sleeping.sleep(http, url, KEY)
    assert caught.value.code == "model_busy"


async def test_a_failed_sleep_is_undone(http: aiohttp.ClientSession) -> None:
    """vLLM stops its scheduler before it sleeps, so it must be told to resume. An engine that cannot be told is
    unusable."""
    broken = web.Response(status=500, text="Memory usage increased after sleeping.")
    answers = {"/sleep": broken, "/is_sleeping": says_asleep(False), "/wake_up": web.Response(status=200)}
    async with strange_engine(answers) as url:
        with pytest.raises(SleepFailed, match="answered 500 Memory usage increased"):
            await sleeping.sleep(http, url, KEY)
    async with strange_engine({**answers, "/wake_up": broken}) as url:
        with pytest.raises(WakeFailed):
            await sleeping.sleep(http, url, KEY)


async def test_an_engine_that_does_not_answer(http: aiohttp.ClientSession) -> None:
    """Every wait ends, and an engine that may still fall asleep is told apart from one that will not."""
    async with strange_engine({"/sleep": None, "/wake_up": None}) as url:
        with pytest.raises(SleepUnsettled, match=r"no answer within 0\.1 s"):
            await sleeping.sleep(http, url, KEY, timeout_secs=0.1)
        with pytest.raises(WakeFailed, match=r"no answer within 0\.1 s"):
            await sleeping.wake(http, url, KEY, timeout_secs=0.1)
    with pytest.raises(SleepUnsettled):
        await sleeping.sleep(http, url, KEY)  # nothing listens any more
    with pytest.raises(WakeFailed):
        await sleeping.wake(http, url, KEY)
    assert await sleeping.is_sleeping(http, url, KEY) is None
    assert not await sleeping.is_guarded(http, url, KEY)


async def test_an_engine_that_still_sleeps_failed_to_wake(http: aiohttp.ClientSession) -> None:
    """A 200 to the wake request is not trusted while the engine says that it sleeps."""
    async with strange_engine({"/wake_up": web.Response(status=200), "/is_sleeping": says_asleep(True)}) as url:
        with pytest.raises(WakeFailed, match="still sleeps"):
            await sleeping.wake(http, url, KEY)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"is_sleeping": "no"}', "<html>"])
async def test_invalid_is_sleeping_answer(http: aiohttp.ClientSession, text: str) -> None:
    """An answer without the expected field is unknown, neither asleep nor awake."""
    async with strange_engine({"/is_sleeping": web.Response(text=text)}) as url:
        assert await sleeping.is_sleeping(http, url, KEY) is None
