"""Engines that die: detected, cleaned up, restarted, and given up after repeated failures."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron.config import RecoverySettings
from neuron.lifecycle.states import Restarts
from tests.neuron.neurons import Neuron, config_of, marked_processes, neuron_here, until

MODEL = "org/model"


async def loaded_again(neuron: Neuron, dead: int) -> dict[str, Any]:
    """The model's entry once an engine other than `dead` serves it."""

    async def reached() -> dict[str, Any] | None:
        entry = await neuron.model(MODEL)
        return entry if entry["status"] == "loaded" and entry["pid"] != dead else None

    found: dict[str, Any] = await until(reached)
    return found


async def test_memory_of_another_load_is_not_foreign(neuron: Neuron) -> None:
    """A restart beside an engine that took memory since the last measurement counts that memory as the engine's own."""
    await neuron.load(MODEL, "--vram-mb", "16000", vram_mb=16000, devices=[0])
    before = await neuron.model(MODEL)
    slow = asyncio.create_task(neuron.load("slow", "--load-secs", "3", vram_mb=16000, devices=[0]))
    await until(lambda: _begun(neuron, "slow"))
    await asyncio.sleep(1.2)  # it takes some thousand MiB, and nothing measures it: a call of /models would
    os.kill(before["pid"], signal.SIGKILL)
    await asyncio.sleep(0.7)
    assert (await loaded_again(neuron, before["pid"]))["failures"] == 1
    assert (await slow).status == 200


async def _holds(neuron: Neuron, vram_mb: int) -> bool:
    """True once that was measured: the last measurement may be of the time when it loaded."""
    return bool((await neuron.model(MODEL))["vram_used_mb"] == vram_mb)


async def _begun(neuron: Neuron, model_id: str) -> bool:
    """True once it was measured while it loads."""
    entry = await neuron.model(model_id)
    return entry.get("pid") is not None and entry["vram_used_mb"] is not None


@pytest.mark.parametrize("options", [(), ("--fault", "spawn-child")])
async def test_killed_engine_comes_back(neuron: Neuron, mark: str, options: tuple[str, ...]) -> None:
    """kill -9: reported within two seconds, not served meanwhile, all its processes cleaned up, and a new engine comes
    up."""
    await neuron.load(MODEL, *options, "--load-secs", "0.5", vram_mb=9000)
    before = await neuron.model(MODEL)
    family = marked_processes(mark)
    killed_at = time.monotonic()
    os.kill(before["pid"], signal.SIGKILL)
    view = await neuron.until_status(MODEL, "recovering")
    assert time.monotonic() - killed_at < 2
    assert (await neuron.endpoint(MODEL)).status == 404
    after = await loaded_again(neuron, before["pid"])
    assert set(marked_processes(mark)).isdisjoint(family)
    assert (after["failures"], after["error"]) == (1, None)
    await until(lambda: _holds(neuron, 9000))
    assert [step["state"] for step in reversed(after["transitions"])][-3:] == ["loaded", "recovering", "loaded"]
    assert "killed by signal 9" in (await neuron.model(MODEL))["transitions"][1]["reason"] or view["reason"]
    assert len(neuron.reserved_ports) == 1
    metrics = (await neuron.call("GET", "/metrics")).body
    assert f'neuron_engine_restarts_total{{model="{MODEL}"}} 1.0' in metrics


async def test_exit_code_zero_is_a_crash_too(neuron: Neuron) -> None:
    """vLLM exits with 0 when its engine core died; no one asked it to stop, so it is restarted."""
    await neuron.load(MODEL, "--fault", "crash-after-secs", "--fault-after", "0.9")
    before = (await neuron.model(MODEL))["pid"]
    assert (await loaded_again(neuron, before))["failures"] >= 1


async def test_the_end_of_an_engine_is_a_warning(neuron: Neuron, caplog: pytest.LogCaptureFixture) -> None:
    """Someone who reads only warnings learns of it; a load and an unload are none."""
    await neuron.load(MODEL, "--load-secs", "0.1")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    before = (await neuron.model(MODEL))["pid"]
    os.kill(before, signal.SIGKILL)
    await loaded_again(neuron, before)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{MODEL}: recovering (")


async def test_a_load_during_recovery_waits_for_it(neuron: Neuron) -> None:
    """A load of a model that recovers joins the recovery."""
    await neuron.load(MODEL, "--load-secs", "0.5")
    before = (await neuron.model(MODEL))["pid"]
    os.kill(before, signal.SIGKILL)
    await neuron.until_status(MODEL, "recovering")
    assert (await neuron.load(MODEL, "--load-secs", "0.5")).status == 200
    assert (await neuron.model(MODEL))["pid"] != before


async def test_given_up_after_failures_in_a_row(mark: str, tmp_path: Path) -> None:
    """An engine that keeps dying is failed, with the cause, until it is loaded again."""
    recovery = {"max_failures": 3, "backoff_secs": 0.1}
    async with neuron_here(config_of(tmp_path / "state", recovery=recovery)) as neuron:
        crashing = ("--fault", "crash-after-secs", "--fault-after", "0.6")
        await neuron.load(MODEL, *crashing)
        view = await neuron.until_status(MODEL, "failed")
        assert view["failures"] == 3
        assert view["reason"] == "given up after 3 failures in a row"
        assert "EngineDeadError" in view["error"]
        assert not marked_processes(mark)
        assert (await neuron.call("GET", f"/models/{MODEL}/logs")).body["lines"]
        assert (await neuron.load(MODEL)).status == 200
        assert (await neuron.model(MODEL))["failures"] == 0


async def test_stop_ends_a_pause(mark: str, tmp_path: Path) -> None:
    """An unload does not wait for the next restart, and nothing starts after it."""
    recovery = {"backoff_secs": 600, "max_backoff_secs": 600}
    async with neuron_here(config_of(tmp_path / "state", recovery=recovery)) as neuron:
        await neuron.load(MODEL, "--fault", "crash-after-secs", "--fault-after", "0.6")

        async def pausing() -> bool:
            entry = await neuron.model(MODEL)
            return bool(entry["failures"] == 2 and entry["retry_at"] and entry["retry_at"] > time.time() + 500)

        await until(pausing)
        assert (await neuron.unload(MODEL)).status == 200
        assert (await neuron.model(MODEL))["status"] == "unloaded"
        assert not marked_processes(mark)


async def test_failed_first_load_is_not_repeated(neuron: Neuron) -> None:
    """An engine that never came up is failed at once, without restarts."""
    assert (await neuron.load(MODEL, "--fault", "oom-at-load")).status == 500
    view = await neuron.model(MODEL)
    assert (view["status"], view["failures"]) == ("failed", 0)


async def test_unhealthy_engine_is_killed_and_comes_back(neuron: Neuron) -> None:
    """An engine whose process runs but whose health check fails is restarted."""
    await neuron.load(MODEL, "--fault", "bad-health", "--fault-after", "1")
    before = (await neuron.model(MODEL))["pid"]
    found = (await neuron.endpoint(MODEL)).body
    headers = {"Authorization": f"Bearer {found['api_key']}"}
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    async with neuron.session.post(f"{found['url']}/v1/completions", json=body, headers=headers) as response:
        await response.read()
    assert (await loaded_again(neuron, before))["failures"] == 1


async def test_hung_engine_is_killed_and_comes_back(mark: str, tmp_path: Path) -> None:
    """Requests run, no token comes, and /health says 200: the engine counts as hung after the grace time. An engine
    with a long prompt does not."""
    health = {"interval_secs": 0.1, "hang_grace_secs": 1, "prefill_grace_secs": 600}
    async with neuron_here(config_of(tmp_path / "state", health=health)) as neuron:
        await neuron.load("patient", "--fault", "slow-prefill", "--fault-after", "600")
        await neuron.load(MODEL, "--tokens-per-sec", "20")
        pids = {model: (await neuron.model(model))["pid"] for model in ("patient", MODEL)}
        asking = [asyncio.create_task(ask_for_tokens(neuron, model)) for model in pids]
        await until(lambda: neuron.activity() == {"patient": 1, MODEL: 1})
        os.kill(pids[MODEL], signal.SIGUSR1)
        after = await loaded_again(neuron, pids[MODEL])
        assert "hung" in after["transitions"][1]["reason"] or "token" in after["transitions"][1]["reason"]
        assert (await neuron.model("patient"))["pid"] == pids["patient"]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def ask_for_tokens(neuron: Neuron, model: str) -> None:
    found = (await neuron.endpoint(model)).body
    headers = {"Authorization": f"Bearer {found['api_key']}"}
    body = {"model": model, "prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    async with neuron.session.post(f"{found['url']}/v1/completions", json=body, headers=headers) as response:
        await response.read()


MAPS_SHARED_MEMORY = """
import mmap, os, sys
fd = os.open(OURS, os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 4096); keep = mmap.mmap(fd, 4096)
from neuron.sim.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def shared_files() -> Iterator[tuple[Path, Path]]:
    """Two names in /dev/shm; only the second has a file."""
    ours, theirs = Path(f"/dev/shm/psm_{os.getpid()}a"), Path(f"/dev/shm/psm_{os.getpid()}b")
    theirs.write_bytes(b"x" * 4096)
    yield ours, theirs
    assert theirs.exists()
    for path in (ours, theirs):
        path.unlink(missing_ok=True)


async def test_shared_memory_goes_with_the_engine(mark: str, tmp_path: Path, shared_files: tuple[Path, Path]) -> None:
    """Files in /dev/shm that a killed engine had mapped are removed; files of other processes stay."""
    ours, _ = shared_files
    script = tmp_path / "engine.py"
    script.write_text(f"OURS = {str(ours)!r}\n{MAPS_SHARED_MEMORY}")
    settings = {"command": [sys.executable, str(script)]}
    async with neuron_here(config_of(tmp_path / "state", sim=settings, recovery={"max_failures": 1})) as neuron:
        await neuron.load(MODEL)
        assert os.access(ours, os.F_OK)
        os.kill((await neuron.model(MODEL))["pid"], signal.SIGKILL)
        await neuron.until_status(MODEL, "failed")
        assert not os.access(ours, os.F_OK)


def test_pauses_between_starts() -> None:
    """Pauses of 0, 10, 20, ... 300 s; five failures in a row; the count starts over after a stable time."""
    restarts = Restarts(RecoverySettings(max_failures=9))
    pauses = []
    while not restarts.given_up:
        restarts = restarts.after_failure(served_secs=1.0)
        pauses.append(restarts.pause_secs)
    assert pauses == [0, 10, 20, 40, 80, 160, 300, 300, 300]
    assert Restarts(RecoverySettings(), failures=4).after_failure(None).given_up
    assert Restarts(RecoverySettings(), failures=4).after_failure(300).failures == 1
    assert Restarts(RecoverySettings(), failures=10**6).pause_secs == 300
