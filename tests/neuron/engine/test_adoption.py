"""A neuron dies or is replaced, and the next one adopts its engines. With real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from neuron.app import build_app
from neuron.config import NeuronConfig
from neuron.engine import records
from neuron.engine.session import Leader, live_members
from neuron.sim.process.leftovers import SHARED_MEMORY
from neuron.spec import EngineSpec
from shared.settings import load_settings
from shared.system.process_stat import stat_of
from tests.neuron.lasting import MODEL, config, leaving, rewritten, streaming
from tests.neuron.neurons import (
    Client,
    NeuronProcess,
    marked_processes,
    neuron_process,
    toml_config,
    until,
)

__all__ = ["config"]


async def killed(neuron: NeuronProcess) -> None:
    await neuron.stop(signal.SIGKILL)


async def test_engine_of_a_killed_neuron_is_adopted(config: Path, mark: str) -> None:
    """After kill -9 during a stream, the stream continues to its end; the new neuron adopts the process, serves its
    endpoint and stops it with all its helpers."""
    async with neuron_process(config) as first:
        await first.load(MODEL, "--tokens-per-sec", "20", vram_mb=7000)
        before = await first.model(MODEL)
        endpoint = (await first.endpoint(MODEL)).body
        async with streaming(first, tokens=30) as stream:
            await killed(first)
            async with neuron_process(config) as second:
                after = await second.until_status(MODEL, "loaded")
                assert (after["pid"], after["devices"]) == (before["pid"], before["devices"])
                assert after["vram_used_mb"] == 7000
                assert "adopted" in after["reason"]
                assert (await second.endpoint(MODEL)).body == endpoint
                assert (await second.load(MODEL, "--tokens-per-sec", "20", vram_mb=7000)).status == 200
                assert (await second.load(MODEL, "--tokens-per-sec", "20", vram_mb=7001)).status == 409
                assert (await stream)[-1] == b"[DONE]"
                assert len(await stream) >= 30
                assert (await second.unload(MODEL)).status == 200
                assert not [pid for pid in marked_processes(mark) if pid != second.process.pid]
                assert (await second.load(MODEL)).status == 200
                assert await second.stop() == 0
    assert not marked_processes(mark)


async def test_stop_can_leave_engines(config: Path, mark: str) -> None:
    """on_stop = "leave_engines": SIGTERM stops neuron immediately, streams continue, and the next neuron takes over."""
    leaving(config)
    async with neuron_process(config) as first:
        await first.load(MODEL, "--tokens-per-sec", "20")
        pid = (await first.model(MODEL))["pid"]
        async with streaming(first, tokens=40) as stream:
            assert await first.stop() == 0
            assert stat_of(pid) is not None
            async with neuron_process(config) as second:
                assert (await second.until_status(MODEL, "loaded"))["pid"] == pid
                assert (await stream)[-1] == b"[DONE]"
                assert (await second.unload(MODEL)).status == 200
                assert not [each for each in marked_processes(mark) if each != second.process.pid]


async def test_loading_engine_is_adopted(config: Path, mark: str) -> None:
    """An engine that is still loading continues, and its model is loaded when it is ready."""
    async with neuron_process(config) as first:
        assert (await first.load(MODEL, "--load-secs", "3", wait=False)).status == 202
        pid = (await until(lambda: _with_pid(first)))["pid"]
        await killed(first)
    async with neuron_process(config) as second:
        assert (await second.load(MODEL, "--load-secs", "3")).status == 200
        assert (await second.model(MODEL))["pid"] == pid


async def _with_pid(neuron: Client) -> dict[str, Any] | None:
    entry = await neuron.model(MODEL)
    return entry if entry.get("pid") else None


async def test_an_adopted_sleeping_engine_can_wake(config: Path, mark: str) -> None:
    """Its memory is booked again when it wakes; if others have it, the wake is refused and the engine keeps
    sleeping."""
    async with neuron_process(config) as neuron:
        assert (await neuron.load(MODEL, "--vram-mb", "15000")).status == 200
        assert (await neuron.call("POST", "/models/sleep", json={"model_id": MODEL})).status == 200
        pid = (await neuron.model(MODEL))["pid"]
        await killed(neuron)
    async with neuron_process(config) as neuron:
        await neuron.until_status(MODEL, "sleeping")
        assert (await neuron.load("org/other", "--vram-mb", "15000")).status == 200
        answer = await neuron.call("POST", "/models/wake", json={"model_id": MODEL})
        assert (answer.status, answer.error["code"]) == (409, "insufficient_vram")
        entry = await neuron.model(MODEL)
        assert (entry["status"], entry["pid"]) == ("sleeping", pid)
        assert (await neuron.unload("org/other")).status == 200
        assert (await neuron.call("POST", "/models/wake", json={"model_id": MODEL})).status == 200
        assert (await neuron.model(MODEL))["pid"] == pid


async def test_engine_that_died_meanwhile_is_restarted(config: Path, mark: str) -> None:
    """The main process is dead and a helper still runs: the helper is killed and the model is loaded again."""
    async with neuron_process(config) as first:
        await first.load(MODEL, "--fault", "spawn-child")
        pid = (await first.model(MODEL))["pid"]
        family = {each for each in marked_processes(mark) if each != first.process.pid}
        await killed(first)
    os.kill(pid, signal.SIGKILL)
    async with neuron_process(config) as second:
        after = await second.until_status(MODEL, "loaded")
        assert after["pid"] not in family
        assert family.isdisjoint(marked_processes(mark))


async def test_engine_that_does_not_answer_is_replaced(config: Path, mark: str) -> None:
    """A process stopped by SIGSTOP is alive but does not serve."""
    async with neuron_process(config) as first:
        await first.load(MODEL)
        pid = (await first.model(MODEL))["pid"]
        await killed(first)
    os.kill(pid, signal.SIGSTOP)
    async with neuron_process(config) as second:
        assert (await second.until_status(MODEL, "loaded"))["pid"] != pid
        assert pid not in marked_processes(mark)


async def test_stopping_engine_is_not_restarted(config: Path, mark: str) -> None:
    """The next neuron completes an unload that a killed neuron had started."""
    async with neuron_process(config) as first:
        await first.load(MODEL, "--fault", "ignore-sigterm")
        state = Path(config.parent / "state")
        unloading = asyncio.create_task(first.unload(MODEL))
        await until(lambda: any(_record_says(path, "stopping") for path in state.glob("engines/*/run.json")))
        await killed(first)
        with contextlib.suppress(aiohttp.ClientError):
            await unloading
    async with neuron_process(config) as second:
        assert await second.model(MODEL) == {}
        assert marked_processes(mark) == [second.process.pid]


def _record_says(path: Path, field: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(path.read_text())[field])
    return False


def _sleeper(command: list[str], **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, **variables})


async def test_recycled_pid_is_never_killed(config: Path, mark: str, tmp_path: Path) -> None:
    """A process that reuses the pid of a record survives, and so does one with the pid of a record of another boot."""
    sleep = shutil.which("sleep") or "sleep"
    others = [_sleeper([sleep, "600"]) for _ in range(2)]
    try:
        for number, (other, boot) in enumerate(zip(others, (records.boot_id(), "other"), strict=True), 1):
            directory = tmp_path / "state" / "engines" / str(number)
            directory.mkdir(parents=True)
            found = stat_of(other.pid)
            assert found is not None
            start = found.start_ticks - 100 if boot != "other" else found.start_ticks
            record = records.RunRecord(
                boot_id=boot,
                number=number,
                engine_id="unknown/1",
                spec=records.spec_fields(EngineSpec(f"m{number}", "sim", f"m{number}", args=("--load-secs", "0.1"))),
                devices=[0],
                booked_mb=[4000],
                host="127.0.0.1",
                port=28901,
                api_key="x",
                tmp_dir=directory / "tmp",
                pid=other.pid,
                start_ticks=start,
                started_at=0,
                ready_at=1,
            )
            records.write(directory / "run.json", record)
        async with neuron_process(config) as neuron:
            assert (await neuron.until_status("m1", "loaded"))["pid"] != others[0].pid
            assert await neuron.model("m2") == {}
        assert [other.poll() for other in others] == [None, None]
    finally:
        for other in others:
            other.kill()
            other.wait()


async def test_engine_without_a_record_is_killed(config: Path, mark: str) -> None:
    """An engine whose record is lost or broken cannot be adopted, so it is killed and does not keep its memory."""
    async with neuron_process(config) as first:
        await first.load("a", "--fault", "spawn-child")
        await first.load("b")
        await killed(first)
    broken, lost = sorted((config.parent / "state").glob("engines/*/run.json"))
    broken.write_text('{"version": 1, "boot_id"')
    lost.unlink()
    async with neuron_process(config) as second:
        assert marked_processes(mark) == [second.process.pid]
        assert (await second.call("GET", "/models")).body == []
        devices = (await second.call("GET", "/health")).body["devices"]
        assert [device["vram_used_mb"] for device in devices] == [0]


async def test_changed_host_does_not_lose_an_engine(config: Path, mark: str) -> None:
    """An engine keeps the address that it was started with, and every later neuron finds it there."""
    async with neuron_process(config) as first:
        await first.load(MODEL)
        before, endpoint = await first.model(MODEL), (await first.endpoint(MODEL)).body
        await killed(first)
    rewritten(config, "", 'host = "127.0.0.2"\n')
    for _ in range(2):
        async with neuron_process(config) as later:
            assert (await later.until_status(MODEL, "loaded"))["pid"] == before["pid"]
            assert (await later.endpoint(MODEL)).body == endpoint
            await killed(later)
    async with neuron_process(config) as last:
        assert (await last.unload(MODEL)).status == 200


@pytest.mark.parametrize(
    ("field", "value"), [("harness", "other"), ("model_id", 5), ("tensor_parallel", "x"), ("new", 1)]
)
async def test_unreadable_spec_affects_one_engine(
    config: Path, mark: str, tmp_path: Path, field: str, value: Any
) -> None:
    """A spec of another version, or a broken one: its engine is killed, the others are adopted, and neuron starts."""
    async with neuron_process(config) as first:
        for model in (MODEL, "other"):
            await first.load(model)
        before = {model: (await first.model(model))["pid"] for model in (MODEL, "other")}
        await killed(first)
    record = tmp_path / "state" / "engines" / "1" / "run.json"
    written = json.loads(record.read_text())
    written["spec"][field] = value
    record.write_text(json.dumps(written))
    async with neuron_process(config) as second:
        assert (await second.until_status("other", "loaded"))["pid"] == before["other"]
        assert await second.model(MODEL) == {}
        assert before[MODEL] not in marked_processes(mark)


async def test_failed_start_keeps_the_records(config: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron that fails to start does not lose running engines: the next one adopts them."""
    async with neuron_process(config) as first:
        await first.load(MODEL)
        pid = (await first.model(MODEL))["pid"]
        await killed(first)

    async def fails(*_: object) -> None:
        raise RuntimeError("no start")

    with monkeypatch.context() as patched:
        patched.setattr("neuron.app.Registry.adopt", fails)
        failing = web.AppRunner(build_app(load_settings(NeuronConfig, config, env_prefix="NEURON_"), port=1))
        with pytest.raises(RuntimeError, match="no start"):
            await failing.setup()
    async with neuron_process(config) as second:
        assert (await second.until_status(MODEL, "loaded"))["pid"] == pid


async def test_state_directory_by_another_path(config: Path, mark: str, tmp_path: Path) -> None:
    """A core whose server is dead is killed even if the state directory is given by another path."""
    (tmp_path / "link").symlink_to(tmp_path)
    rewritten(config, str(tmp_path / "state"), str(tmp_path / "link" / "state"))
    async with neuron_process(config) as first:
        await first.load(MODEL)
        pid = (await first.model(MODEL))["pid"]
        await killed(first)
    os.kill(pid, signal.SIGKILL)
    orphans = marked_processes(mark)
    assert orphans
    rewritten(config, str(tmp_path / "link" / "state"), str(tmp_path / "state"))
    async with neuron_process(config) as second:
        await second.until_status(MODEL, "loaded")
        assert not set(orphans) & set(marked_processes(mark))


async def test_files_of_an_engine_that_died_with_its_neuron(config: Path, mark: str) -> None:
    """The next neuron removes what the record lists in /dev/shm."""
    before = set(SHARED_MEMORY.iterdir())
    async with neuron_process(config) as first:
        await first.load(MODEL, "--fault", "leave-files")
        made = set(SHARED_MEMORY.iterdir()) - before
        await killed(first)
    assert made
    for pid in marked_processes(mark):
        os.kill(pid, signal.SIGKILL)
    async with neuron_process(config) as second:
        assert (await second.unload(MODEL)).status == 200
        assert not made & set(SHARED_MEMORY.iterdir())


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


async def test_members_of_a_dead_leader_are_recognised_by_the_engine_id(mark: str, tmp_path: Path) -> None:
    """Without the leader the session's id is not reliable: only processes with the engine's id are members."""
    sleep = shutil.which("sleep") or "sleep"
    script = f"{sleep} 600 & env -u NEURON_ENGINE_ID {sleep} 600 & wait"
    shell = _sleeper([shutil.which("sh") or "sh", "-c", script], NEURON_ENGINE_ID="e/1")
    found = stat_of(shell.pid)
    assert found is not None
    leader = Leader(shell.pid, found.start_ticks, "e/1")
    # Both children: until then the second has the id still, from the shell that it was.
    await until(lambda: [_name_of(pid) for pid in sorted(live_members(leader))].count("sleep") == 2)
    shell.kill()
    shell.wait()
    left = live_members(leader)
    assert len(left) == 1
    for pid in marked_processes(mark):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not marked_processes(mark))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with 64 KiB of space."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "small", str(path)]
    if os.getuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


async def test_full_disk_refuses_a_load(mark: str, tmp_path: Path, small_disk: Path) -> None:
    """Without a record an engine would be lost if neuron died, so the load fails with an error that names the disk."""
    config = toml_config(tmp_path, "port = 0", f'state_dir = "{small_disk}"')
    async with neuron_process(config) as neuron:
        assert (await neuron.load("kept")).status == 200
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        answer = await neuron.load(MODEL)
        assert answer.status == 500
        assert "No space left on device" in answer.error["message"]
        assert (await neuron.model(MODEL))["status"] == "failed"
        assert (await neuron.model("kept"))["status"] == "loaded"
        filler.unlink()
        assert (await neuron.load(MODEL)).status == 200
        assert await neuron.stop() == 0
