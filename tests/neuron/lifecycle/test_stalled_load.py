"""Loads that neither work nor end: told, ended with the reason, and the device's turn goes on. Real stuck processes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from neuron.config import NeuronConfig
from tests.neuron.neurons import Neuron, config_of, marked_processes, neuron_here, until

ENGINE = """
import os, sys, time
way = sys.argv[2].rpartition("/")[2]
lock = os.environ.get("HOME", "") + "/.cache/torch_extensions/py313_cu130/fused/lock"
print("Building the extension fused...", flush=True)
if way == "waits":  # as torch.utils.file_baton does
    while os.path.exists(lock):
        time.sleep(0.1)
elif way == "child":  # the work, or none, is a child's
    os.system("sleep 100")
elif way == "computes":
    while True:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass
        time.sleep(0.1)
elif way == "reads":
    with open(__file__, "rb", buffering=0) as weights:
        while True:
            weights.seek(0)
            weights.read(500)
            time.sleep(0.2)
elif way == "answers":  # its server is up, reads as libuv does and logs each request
    import socket
    listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
    while True:
        connection, _ = listener.accept()
        with connection:
            while os.read(connection.fileno(), 65536):
                print('INFO: "GET /health HTTP/1.1" 503', flush=True)
                os.write(connection.fileno(), b"HTTP/1.1 503 Loading\\r\\ncontent-length: 0\\r\\n\\r\\n")
elif way == "prints":
    while True:
        print(".", end="", flush=True)
        time.sleep(0.2)
os.execv(sys.executable, [sys.executable, "-m", "neuron.sim", *sys.argv[1:], "--load-secs", "0.2"])
"""


def config(tmp_path: Path, **settings: Any) -> NeuronConfig:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    env = {"HOME": str(tmp_path / "home")}
    sim = {"command": [sys.executable, str(script)], "env": env, "stop_timeout_secs": 1, "spare": False, **settings}
    return config_of(tmp_path / "state", sim=sim, simulate={"devices": ["RTX 5090"] * 3})


async def load(neuron: Neuron, way: str, **fields: Any) -> Any:
    return await neuron.call("POST", "/models/load", json={"model_id": f"org/{way}", "harness": "sim", **fields})


def left_lock(tmp_path: Path) -> Path:
    """What a killed build of a torch extension leaves behind."""
    path = tmp_path / "home/.cache/torch_extensions/py313_cu130/fused/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


async def test_a_build_that_waits_for_a_dead_one_is_ended(mark: str, tmp_path: Path) -> None:
    """The progress tells it, the reason names the lock and the last line, and the next engine starts on the device."""
    lock = left_lock(tmp_path)
    async with neuron_here(config(tmp_path, stall_timeout_secs=5)) as neuron:
        stuck = asyncio.create_task(load(neuron, "waits", vram_mb=9000, devices=[0]))
        progress = await until(lambda: _idle_progress(neuron, "org/waits"))
        assert progress["message"].startswith("no output, CPU time or I/O")
        assert "it is ended after 5 s" in progress["message"]
        assert progress["idle_secs"] >= 1
        assert str(lock) in progress["message"]
        next_one = asyncio.create_task(load(neuron, "next", vram_mb=9000, devices=[0]))
        answer = await stuck
        assert (answer.status, answer.error["code"], answer.error["cause"]) == (500, "load_failed", "node")
        first_line = answer.error["message"].splitlines()[0]
        assert first_line.startswith("no output, CPU time or I/O of the engine for 5 s; ")
        assert str(lock) in first_line
        assert first_line.endswith("its last line: Building the extension fused...")
        assert (await neuron.model("org/waits"))["error"] == first_line
        assert (await next_one).status == 200
    assert not marked_processes(mark)


async def _idle_progress(neuron: Neuron, model_id: str) -> Any:
    progress = (await neuron.model(model_id)).get("progress") or {}
    return progress if progress.get("idle_secs") is not None else None


async def test_health_checks_are_not_work(mark: str, tmp_path: Path) -> None:
    """A server that does nothing but answer that it is not ready is ended like any other load."""
    async with neuron_here(config(tmp_path, stall_timeout_secs=3, startup_timeout_secs=30)) as neuron:
        answer = await load(neuron, "answers")
        assert answer.error["message"].startswith(
            "no output, CPU time or I/O of the engine for 3 s; its last line: INFO"
        )
    assert not marked_processes(mark)


async def test_children_count_as_the_engine(mark: str, tmp_path: Path) -> None:
    """One that waits for a child that does nothing is ended, with the child."""
    async with neuron_here(config(tmp_path, stall_timeout_secs=2)) as neuron:
        answer = await load(neuron, "child")
        assert answer.error["message"].startswith("no output, CPU time or I/O of the engine for 2 s; its last line: B")
    assert not marked_processes(mark)


async def test_an_engine_that_works_in_any_way_goes_on(mark: str, tmp_path: Path) -> None:
    """An engine that computes, reads or prints has all of startup_timeout_secs."""
    async with neuron_here(config(tmp_path, stall_timeout_secs=3, startup_timeout_secs=6)) as neuron:
        answers = await asyncio.gather(*(load(neuron, way, vram_mb=9000) for way in ("computes", "reads", "prints")))
        assert [answer.error["code"] for answer in answers] == ["load_timeout"] * 3
    assert not marked_processes(mark)


async def test_zero_turns_it_off(mark: str, tmp_path: Path) -> None:
    """The load has all of startup_timeout_secs."""
    async with neuron_here(config(tmp_path, stall_timeout_secs=0, startup_timeout_secs=2)) as neuron:
        assert (await load(neuron, "child")).error["code"] == "load_timeout"
    assert not marked_processes(mark)
