"""Spare processes with the simulated engine: made after a load, taken by the next one, gone in every other case."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from neuron.engine.session import engine_id_of
from neuron.harness import sim
from neuron.lifecycle.spare import spares
from neuron.lifecycle.spare.spare import Spare
from neuron.sim.process.loading import _WEIGHTS
from tests.neuron.neurons import (
    Client,
    Neuron,
    config_of,
    marked_engines,
    marked_processes,
    neuron_here,
    neuron_process,
    toml_config,
    until,
)
from tests.processes import alive

SPARE = {"spare": True}


async def spare_of(client: Client) -> dict[str, Any]:
    """The spare process once it is ready."""

    async def ready() -> dict[str, Any] | None:
        found = (await client.call("GET", "/health")).body["spares"]
        return next((each for each in found if each["state"] == "ready"), None)

    spare: dict[str, Any] = await until(ready)
    return spare


@pytest.fixture
async def neuron(mark: str, tmp_path: Path) -> AsyncIterator[Neuron]:
    """A neuron that keeps a spare process."""
    async with neuron_here(config_of(tmp_path / "state", sim=SPARE)) as started:
        yield started
    assert not marked_processes(mark)


async def local_sockets(client: Client, model: str) -> int:
    """How many Unix sockets the model's engine has, once it has answered a request with its key."""
    endpoint = (await client.endpoint(model)).body
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    headers = {"Authorization": f"Bearer {endpoint['api_key']}", "Connection": "close"}
    async with client.session.post(f"{endpoint['url']}/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200
        assert (await answer.json())["choices"]
    return len(psutil.Process((await client.model(model))["pid"]).net_connections("unix"))


async def test_a_load_takes_the_spare(neuron: Neuron) -> None:
    """The spare becomes the engine: its own session, command line, key, files and priority as after a plain start. Then
    there is another spare."""
    assert (await neuron.load("a")).status == 200
    plain = await neuron.model("a")
    spare = await spare_of(neuron)
    assert spare["harness"] == "sim"
    assert spare["memory_mb"] > 5
    assert (await neuron.load("b")).status == 200
    entry = await neuron.model("b")
    assert entry["pid"] == spare["pid"] != plain["pid"]
    pid, pids = entry["pid"], [psutil.Process(each["pid"]) for each in (plain, entry)]
    assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)
    one, other = (_without_values(process.cmdline()) for process in pids)
    assert one == other
    assert await local_sockets(neuron, "a") == await local_sockets(neuron, "b")
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER
    assert len({process.cwd() for process in pids}) == 1
    assert engine_id_of(pid)
    lines = (await neuron.call("GET", "/models/b/logs")).body["lines"]
    assert any("Application startup complete." in line for line in lines)
    assert (await spare_of(neuron))["pid"] != pid
    page = (await neuron.call("GET", "/metrics")).body
    assert re.search(r'neuron_spare_memory_bytes\{harness="sim"\} [1-9]', page)


def _without_values(arguments: list[str]) -> list[str]:
    """A command line without what differs between two engines: padding, the model and the port."""
    words = [word.strip() for word in arguments if word.strip()]
    return [word for word in words if word not in ("a", "b") and not word.isdecimal()]


async def test_spare_is_unset_by_default(mark: str, tmp_path: Path) -> None:
    """The simulation starts too quickly to be worth one."""
    async with neuron_here(config_of(tmp_path / "state")) as neuron:
        await neuron.load("a")
        assert (await neuron.call("GET", "/health")).body["spares"] == []
        assert len(marked_engines(mark)) == 1


async def test_environment_that_imports_read_needs_a_plain_start(neuron: Neuron) -> None:
    """A model that cannot sleep has another environment; the next spare is made for that."""
    await neuron.load("a")
    first = await spare_of(neuron)
    await neuron.load("b", "--no-enable-sleep-mode")
    assert (await neuron.model("b"))["pid"] != first["pid"]
    assert not psutil.pid_exists(first["pid"])
    second = await spare_of(neuron)
    await neuron.load("c", "--no-enable-sleep-mode")
    assert (await neuron.model("c"))["pid"] == second["pid"]


async def test_load_takes_a_spare_the_moment_it_is_ready(neuron: Neuron, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its memory is measured for the first time."""
    measured, measure = threading.Event(), Spare.memory_mb

    def wait_and_measure(self: Spare) -> int:
        assert measured.wait(30)
        return measure(self)

    monkeypatch.setattr(Spare, "memory_mb", wait_and_measure)
    await neuron.load("a")
    spare = await spare_of(neuron)
    await neuron.load("b")
    measured.set()
    assert (await spare_of(neuron))["pid"] != spare["pid"]
    assert (await neuron.model("b"))["pid"] == spare["pid"]
    assert len(list((neuron.state_dir / "engines").glob("*/run.json"))) == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_dead_or_hung_spare_does_not_fail_the_load(
    neuron: Neuron, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A hung one has a second to answer; then the engine is started without it, and the log says why."""
    await neuron.load("a")
    spare = await spare_of(neuron)
    os.kill(spare["pid"], number)
    assert (await neuron.load("b")).status == 200
    assert (await neuron.model("b"))["pid"] != spare["pid"]
    assert not psutil.pid_exists(spare["pid"])
    assert "spare process failed" in caplog.text


async def test_spare_that_dies_is_replaced_after_a_pause(neuron: Neuron, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure in a row makes the pause longer."""
    monkeypatch.setattr(spares, "FIRST_PAUSE_SECS", 0.1)
    monkeypatch.setattr(spares, "CHECK_SECS", 0.1)
    await neuron.load("a")
    first = await spare_of(neuron)
    os.kill(first["pid"], signal.SIGKILL)

    async def replaced() -> bool:
        return bool((await spare_of(neuron))["pid"] != first["pid"])

    await until(replaced)


async def test_engine_that_was_a_spare_recovers_from_a_crash(neuron: Neuron) -> None:
    """kill -9 of it, like of any engine: nothing of it is left, and the model is loaded again."""
    await neuron.load("a")
    spare = await spare_of(neuron)
    await neuron.load("b")
    os.kill(spare["pid"], signal.SIGKILL)

    async def recovered() -> bool:
        entry = await neuron.model("b")
        return bool(entry["status"] == "loaded" and entry["pid"] != spare["pid"])

    await until(recovered)
    assert not psutil.pid_exists(spare["pid"])


async def test_engine_that_fails_only_as_a_spare_is_started_without(mark: str, tmp_path: Path) -> None:
    """An engine made from a spare that exits during its load does not fail the load."""
    script = tmp_path / "engine.py"
    script.write_text(
        "import sys\n"
        "if 'neuron.sim.process.lifecycle' in sys.modules: sys.exit(9)\n"
        "from neuron.sim.__main__ import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, str(script)]
    async with neuron_here(config_of(tmp_path / "state", sim={"command": command, **SPARE})) as neuron:
        await neuron.load("a")
        spare = await spare_of(neuron)
        assert (await neuron.load("b")).status == 200
        assert (await neuron.model("b"))["pid"] != spare["pid"]
    assert not marked_processes(mark)


async def test_changed_program_needs_a_plain_start(mark: str, tmp_path: Path) -> None:
    """An upgrade: what the spare has imported is old."""
    script = tmp_path / "engine.py"
    text = "import sys\nfrom neuron.sim.__main__ import main\nsys.exit(main())\n"
    script.write_text(text)
    command = [sys.executable, str(script)]
    async with neuron_here(config_of(tmp_path / "state", sim={"command": command, **SPARE})) as neuron:
        await neuron.load("a")
        spare = await spare_of(neuron)
        script.write_text(text)
        assert (await neuron.load("b")).status == 200
        assert (await neuron.model("b"))["pid"] != spare["pid"]
        spare = await spare_of(neuron)
        assert (await neuron.load("c")).status == 200
        assert (await neuron.model("c"))["pid"] == spare["pid"]


async def test_command_that_is_not_python_has_no_spare(
    mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrapper in shell, for example. Once it is a Python script, after an upgrade, the next load brings one."""
    caplog.set_level("INFO")
    wrapper = tmp_path / "engine"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m neuron.sim "$@"\n')
    wrapper.chmod(0o755)
    async with neuron_here(config_of(tmp_path / "state", sim={"command": [str(wrapper)], **SPARE})) as neuron:
        await neuron.load("a")
        await until(lambda: "no spare process is possible" in caplog.text)
        assert "is not a Python script" in caplog.text
        assert (await neuron.load("b")).status == 200
        wrapper.write_text(f"#!{sys.executable}\nfrom neuron.sim.__main__ import main\nraise SystemExit(main())\n")
        assert (await neuron.load("c")).status == 200
        assert (await spare_of(neuron))["harness"] == "sim"
    assert caplog.text.count("no spare process is possible") == 1


async def test_spare_ends_with_a_killed_neuron(mark: str, tmp_path: Path) -> None:
    """kill -9 of neuron: its spare ends by itself, and an engine that was a spare is adopted and stopped as any."""
    config = toml_config(tmp_path, f'state_dir = "{tmp_path}/state"')
    config.write_text(config.read_text().replace("[harness.sim]", "[harness.sim]\nspare = true"))
    async with neuron_process(config) as first:
        await first.load("a")
        engine = await spare_of(first)
        await first.load("b")
        await first.unload("a")
        spare = await spare_of(first)
        await first.stop(signal.SIGKILL)
        await until(lambda: not alive([spare["pid"]]))
        async with neuron_process(config) as second:
            assert (await second.until_status("b", "loaded"))["pid"] == engine["pid"]
            await second.unload("b")
            assert engine["pid"] not in marked_processes(mark)
            assert (await second.load("a")).status == 200
    await until(lambda: not marked_processes(mark))


async def test_spare_that_still_imports_ends_with_a_killed_neuron(mark: str, tmp_path: Path) -> None:
    """It does not look at its connection for as long as the imports take."""
    config = toml_config(tmp_path, f'state_dir = "{tmp_path}/state"')
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import sys\n"
        "if any('spare_process' in word for word in sys.orig_argv):\n"
        "    import importlib, time\n"
        "    importlib.import_module = lambda name: time.sleep(60)\n"
    )
    config.write_text(config.read_text().replace("[harness.sim]", "[harness.sim]\nspare = true"))
    async with neuron_process(config, env={"PYTHONPATH": str(hook.parent)}) as first:
        await first.load("a")

        async def importing() -> Any:
            return (await first.call("GET", "/health")).body["spares"]

        (spare,) = await until(importing)
        assert spare["state"] == "importing"
        await until(lambda: _imports(spare["pid"]))
        await first.stop(signal.SIGKILL)
        await until(lambda: not alive([spare["pid"]]), timeout_secs=3)
    async with neuron_process(config) as second:
        await second.until_status("a", "loaded")
        await second.unload("a")
    await until(lambda: not marked_processes(mark))


def _imports(pid: int) -> bool:
    """True while the spare process is in its imports: it sleeps there in this test, and its connection has a signal."""
    return "hrtimer_nanosleep" in Path(f"/proc/{pid}/wchan").read_text()


async def test_automatic_spare_yields_its_memory_to_a_sleeping_engine(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spare counts as taken host memory. When a sleep needs that, the spare ends, and none is made while the memory
    is short."""
    monkeypatch.setattr(sim, "_IMPORTS", replace(sim._IMPORTS, automatic=True))
    host = {"devices": ["RTX 5090"], "ram_mb": 1100}
    weights_mb = 1080
    config = config_of(tmp_path / "state", simulate=host, sleep={"ram_reserve_mb": 0})
    async with neuron_here(config) as neuron:
        await neuron.load("a", vram_mb=int(weights_mb / _WEIGHTS))
        spare = await spare_of(neuron)
        assert spare["memory_mb"] > 1100 - weights_mb
        answer = await neuron.call("POST", "/models/sleep", json={"model_id": "a"})
        assert answer.status == 200, answer.body
        assert not psutil.pid_exists(spare["pid"])
        assert (await neuron.call("GET", "/health")).body["spares"] == []


async def test_one_of_several_instances_takes_the_spare(mark: str, tmp_path: Path) -> None:
    """Of instances that are loaded at once one becomes the spare and the others start plainly; all serve."""
    config = config_of(tmp_path / "state", sim=SPARE, simulate={"devices": ["H100"] * 4})
    async with neuron_here(config) as neuron:
        assert (await neuron.load("a", instance="0")).status == 200
        spare = await spare_of(neuron)
        loads = [neuron.load("a", instance=instance) for instance in ("1", "2", "3")]
        assert [answer.status for answer in await asyncio.gather(*loads)] == [200] * 3
        pids = [entry["pid"] for entry in (await neuron.call("GET", "/models")).body]
        assert len(set(pids)) == 4
        assert spare["pid"] in pids[1:]
        assert (await spare_of(neuron))["pid"] not in pids
    assert not marked_processes(mark)
