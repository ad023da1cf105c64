"""Loads: joined, refused, explained, and never started twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from neuron.gpu import simulated_vram as vram
from tests.neuron.neurons import Answer, Neuron, config_of, marked_engines, marked_processes, neuron_here, until

MODEL = "org/model"


async def test_load_answers_when_the_engine_is_healthy(neuron: Neuron) -> None:
    """The load answers 200 once the engine serves; its endpoint accepts only the key that comes with it."""
    answer = await neuron.load(MODEL, vram_mb=10_000)
    assert (answer.status, answer.body["status"]) == (200, "loaded")
    found = (await neuron.endpoint(MODEL)).body
    for key, status in ((found["api_key"], 200), ("wrong", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        async with neuron.session.get(f"{found['url']}/v1/models", headers=headers) as response:
            assert response.status == status


async def test_view_of_a_loaded_model(neuron: Neuron) -> None:
    """`vram_used_mb` is what the engine really holds, and the device's own figure agrees; `max_model_len` is what the
    engine says."""
    await neuron.load(MODEL, "--max-model-len", "5000", tensor_parallel=2, vram_mb=20_000)
    view = await neuron.model(MODEL)
    assert view["status"] == "loaded"
    assert view["harness"] == "sim"
    assert view["devices"] == [0, 1]
    assert view["vram_used_mb"] == 20_000
    assert view["max_model_len"] == 5000
    assert view["error"] is None
    devices = (await neuron.call("GET", "/health")).body["devices"]
    assert [device["vram_used_mb"] for device in devices] == [10_000, 10_000]


async def test_memory_of_a_load_is_not_foreign(neuron: Neuron) -> None:
    """What an engine takes while it loads is its own, also when no call asks for the models meanwhile."""
    await neuron.load(MODEL, "--load-secs", "2", wait=False, vram_mb=20_000)
    before = 0
    while before < 20_000:
        (device,) = (each for each in (await neuron.call("GET", "/health")).body["devices"] if each["index"] == 0)
        assert device["vram_foreign_mb"] == 0, device
        if before == 0 < device["vram_used_mb"]:
            await neuron.model(MODEL)
        before = device["vram_used_mb"]
    assert (await neuron.load(MODEL, "--load-secs", "2", vram_mb=20_000)).status == 200


async def test_fifty_loads_at_once_start_one_engine(neuron: Neuron, mark: str) -> None:
    """Concurrent loads of one model start one process, and every caller gets the answer."""
    answers = await asyncio.gather(*(neuron.load(MODEL) for _ in range(50)))
    assert {answer.status for answer in answers} == {200}
    assert len(marked_engines(mark)) == 1
    assert len(neuron.reserved_ports) == 1


async def test_same_spec_again_is_done_already(neuron: Neuron) -> None:
    """A second load returns 200 without a new process, also when it names the devices that neuron chose."""
    await neuron.load(MODEL)
    pid = (await neuron.model(MODEL))["pid"]
    chosen = (await neuron.model(MODEL))["devices"]
    assert (await neuron.load(MODEL)).status == 200
    assert (await neuron.load(MODEL, devices=chosen)).status == 200
    assert (await neuron.model(MODEL))["pid"] == pid


async def test_other_spec_conflicts(neuron: Neuron) -> None:
    """Another spec is 409: with the words a cortex looks for when the model is loaded, without them while it loads."""
    loading = asyncio.create_task(neuron.load(MODEL, "--load-secs", "1.5"))
    await neuron.until_status(MODEL, "loading")
    early = await neuron.load(MODEL, quant="fp8")
    assert (early.status, early.error["code"]) == (409, "load_in_progress")
    assert "already loaded" not in early.error["message"]
    assert (await loading).status == 200
    late = await neuron.load(MODEL, "--load-secs", "1.5", quant="fp8")
    assert (late.status, late.error["code"]) == (409, "already_loaded")
    assert "already loaded" in late.error["message"]
    assert "quant" in late.error["message"]


async def test_bare_load_takes_the_remembered_spec(neuron: Neuron) -> None:
    """A body with only model_id: 404 when unknown, joined when loading or loaded, the earlier spec when unloaded."""
    assert (await neuron.call("POST", "/models/load", json={"model_id": MODEL})).status == 404
    await neuron.load(MODEL, tensor_parallel=2, vram_mb=4000)
    assert (await neuron.call("POST", "/models/load", json={"model_id": MODEL})).status == 200
    await neuron.unload(MODEL)
    assert (await neuron.call("POST", "/models/load", json={"model_id": MODEL})).status == 200
    view = await neuron.model(MODEL)
    assert (view["tensor_parallel"], view["vram_used_mb"]) == (2, 4000)


async def test_a_load_without_wait_returns_at_once(neuron: Neuron) -> None:
    """?wait=false answers 202 before the engine is ready; an invalid request is still a 4xx."""
    answer = await neuron.load(MODEL, wait=False)
    assert (answer.status, answer.body["status"]) == (202, "loading")
    assert (await neuron.load("other", wait=False, devices=[7])).status == 400
    await neuron.until_status(MODEL, "loaded")


async def test_caller_that_leaves_cancels_nothing(neuron: Neuron) -> None:
    """The load continues when no caller waits for it."""
    caller = asyncio.create_task(neuron.load(MODEL, "--load-secs", "0.6"))
    await neuron.until_status(MODEL, "loading")
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    await neuron.until_status(MODEL, "loaded")


async def test_an_engine_that_is_not_installed(mark: str, tmp_path: Path) -> None:
    """The message says which program is missing, and where neuron.toml names it."""
    absent = config_of(tmp_path / "state", harness={"vllm": {"command": ["/absent/vllm"]}})
    async with neuron_here(absent) as neuron:
        answer = await neuron.load(MODEL, harness="vllm", vram_mb=8000)
    assert (answer.status, answer.error["code"]) == (500, "load_failed")
    assert answer.error["message"].startswith("this host has no executable '/absent/vllm': install the engine")
    assert "`command`" in answer.error["message"]


async def test_failed_load_says_why(neuron: Neuron) -> None:
    """The message has the root cause, which is not the last line, and the last lines; the model's entry keeps both."""
    answer = await neuron.load(MODEL, "--fault", "oom-at-load", vram_mb=8000)
    assert (answer.status, answer.error["code"]) == (500, "load_failed")
    first, *rest = answer.error["message"].splitlines()
    assert first.startswith("OutOfMemoryError: CUDA out of memory.")
    assert "See root cause above" in rest[-1]
    view = await neuron.model(MODEL)
    assert view["status"] == "failed"
    assert view["error"] == first
    lines = (await neuron.call("GET", f"/models/{MODEL}/logs?tail=5")).body["lines"]
    assert len(lines) == 5
    assert not neuron.reserved_ports
    assert (await neuron.load(MODEL)).status == 200


async def test_load_without_enough_memory_is_refused(neuron: Neuron, mark: str) -> None:
    """A load that does not fit beside another is refused with the figures and starts nothing; the other is unaffected,
    and once it is gone the same load succeeds."""
    await neuron.load("first", devices=[0], vram_mb=30_000)
    answer = await neuron.load("second", devices=[0], vram_mb=8000)
    assert (answer.status, answer.error["code"]) == (409, "insufficient_vram")
    assert answer.error["message"] == (
        "'second' needs 8000 MiB on device 0; "
        "device 0 (RTX 5090): 2607 of 32607 MiB available (30000 booked for 'first')"
    )
    assert answer.error["devices"][0]["bookable_mb"] == 2607
    assert len(marked_processes(mark)) == 2  # its server and its core
    assert (await neuron.model("first"))["status"] == "loaded"
    assert (await neuron.load("third", vram_mb=8000)).status == 200
    assert (await neuron.model("third"))["devices"] == [1]
    await neuron.unload("first")
    assert (await neuron.load("second", devices=[0], vram_mb=8000)).status == 200


async def test_memory_of_others_counts(neuron: Neuron) -> None:
    """Memory held by a foreign process cannot be booked; /health and /metrics report it separately."""
    await neuron.load("first", devices=[0], vram_mb=8000)
    uuid = (await neuron.call("GET", "/discovery")).body["devices"][0]["uuid"]
    await asyncio.to_thread(vram.hold, neuron.state_dir / "vram", {uuid: 20_000})  # this process, not an engine
    figures = (await neuron.call("GET", "/health")).body["devices"]
    told = [[device[f"vram_{name}_mb"] for name in ("booked", "foreign", "bookable")] for device in figures]
    assert told == [[8000, 20_000, 4607], [0, 0, 32_607]]
    page = (await neuron.call("GET", "/metrics")).body
    for name, mb in (("booked", 8000), ("foreign", 20_000)):
        (value,) = re.findall(rf'neuron_device_memory_{name}_bytes{{index="0",uuid="{uuid}"}} (\S+)', page)
        assert float(value) == mb * 2**20
    refused = await neuron.load("second", devices=[0], vram_mb=8000)
    assert "20000 used by other processes" in refused.error["message"]


async def test_two_loads_at_once_do_not_book_the_same_memory(neuron: Neuron) -> None:
    """Of five loads that each want two thirds of a device, two succeed and three are refused."""
    answers = await asyncio.gather(*(neuron.load(f"m{number}", vram_mb=20_000) for number in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 200, 409, 409, 409]


async def test_two_loads_at_once_take_different_devices(neuron: Neuron) -> None:
    """A device is booked when it is chosen, not when the engine has filled it."""
    await asyncio.gather(neuron.load("first", vram_mb=20_000), neuron.load("second", vram_mb=20_000))
    assert {tuple((await neuron.model(model))["devices"]) for model in ("first", "second")} == {(0,), (1,)}


async def test_load_that_takes_too_long(mark: str, tmp_path: Path) -> None:
    """The answer is 504 after startup_timeout_secs, and no process is left."""
    config = config_of(tmp_path / "state", sim={"startup_timeout_secs": 1.0})
    async with neuron_here(config) as neuron:
        answer = await neuron.load(MODEL, "--fault", "never-ready")
        assert (answer.status, answer.error["code"]) == (504, "load_timeout")
        assert not marked_processes(mark)
        assert (await neuron.model(MODEL))["status"] == "failed"


async def test_missing_executable(mark: str, tmp_path: Path) -> None:
    """The error names what could not be started, and says that another try is useless."""
    async with neuron_here(config_of(tmp_path / "state", sim={"command": ["/nowhere/vllm"]})) as neuron:
        answer = await neuron.load(MODEL)
        assert (answer.status, answer.error["code"]) == (500, "load_failed")
        assert "/nowhere/vllm" in answer.error["message"]
        assert answer.error["permanent"] is True
        assert not neuron.reserved_ports


async def test_model_larger_than_any_device_is_refused_for_good(neuron: Neuron) -> None:
    """What the devices lack only now is refused until later."""
    too_large = await neuron.load(MODEL, vram_mb=900_000)
    assert (too_large.status, too_large.error["code"], too_large.error["permanent"]) == (409, "insufficient_vram", True)
    assert (await neuron.load("a", vram_mb=30_000)).status == 200
    for_now = await neuron.load(MODEL, vram_mb=40_000, tensor_parallel=2)
    assert (for_now.status, for_now.error.get("permanent")) == (409, None)


# Takes the port itself the first time, between neuron's check and the engine's bind, so the engine's bind fails.
THIEF = """
import pathlib, socket, subprocess, sys
once = pathlib.Path(sys.argv[1])
port = int(sys.argv[sys.argv.index("--port") + 1])
command = [sys.executable, "-m", "neuron.sim", *sys.argv[2:]]
if once.exists():
    import os; os.execv(sys.executable, command)
once.touch()
thief = socket.socket(); thief.bind(("127.0.0.1", port)); thief.listen()
sys.exit(subprocess.call(command))
"""


async def test_stolen_port_is_replaced(mark: str, tmp_path: Path) -> None:
    """A load survives another process taking the port just before the engine binds it."""
    script = tmp_path / "thief.py"
    script.write_text(textwrap.dedent(THIEF))
    command = [sys.executable, str(script), str(tmp_path / "once")]
    async with neuron_here(config_of(tmp_path / "state", sim={"command": command})) as neuron:
        assert (await neuron.load(MODEL)).status == 200
        assert len(neuron.reserved_ports) == 1


# A foreign server that answers everything with 200, while the engine hangs before it listens.
SERVER = """
import http.server, os, sys, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *a): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
if FOREIGN and os.environ.get("NEURON_ENGINE_ID"):
    if os.fork() > 0:
        time.sleep(60)  # the engine, which never listens
    os.setsid()  # an unrelated process that listens and is not part of the engine
    del os.environ["NEURON_ENGINE_ID"]
    os.execv(sys.executable, [sys.executable, *sys.argv])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


async def load_server(tmp_path: Path, mark: str, *, foreign: bool) -> Answer:
    """A load whose command answers 200 to any caller: itself, or through a foreign process on its port."""
    script = tmp_path / "server.py"
    script.write_text(f"FOREIGN = {foreign}{SERVER}")
    settings = {"command": [sys.executable, str(script)], "startup_timeout_secs": 1.5 if foreign else 20}
    async with neuron_here(config_of(tmp_path / "state", sim=settings)) as neuron:
        answer = await neuron.load(MODEL)
    if foreign:
        for pid in marked_processes(mark):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not marked_processes(mark))
    return answer


async def test_foreign_listener_on_the_port_is_not_taken_for_the_engine(mark: str, tmp_path: Path) -> None:
    """A listener outside the engine's session that does not know the key is not accepted as the engine."""
    assert (await load_server(tmp_path, mark, foreign=True)).error["code"] == "load_timeout"


async def test_health_alone_makes_an_engine_ready(mark: str, tmp_path: Path) -> None:
    """Our own process that answers 200 on /health counts as loaded, whether or not it wants a key."""
    assert (await load_server(tmp_path, mark, foreign=False)).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"devices": [2]}, "devices"),
        ({"devices": [0, 0]}, "devices"),
        ({"devices": [0], "tensor_parallel": 2}, "devices"),
        ({"tensor_parallel": 3}, "tensor_parallel"),
        ({"harness": "llamacpp"}, "harness"),
        ({"args": ["--port", "1"]}, "args"),
        ({"source": "../etc"}, "source"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"vram_mb": "much"}, "vram_mb"),
    ],
)
async def test_refused_before_anything_starts(neuron: Neuron, fields: dict[str, Any], param: str) -> None:
    """400 names the field, and the model does not become known."""
    answer = await neuron.load(MODEL, **fields)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert await neuron.model(MODEL) == {}
