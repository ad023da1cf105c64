"""A described engine as a real process: loaded, found ready, reached, restarted, adopted, stopped; why it failed."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from neuron.harness.checks import CheckedConfig
from tests.neuron.neurons import Answer, Neuron, listening_socket, marked_processes, neuron_here, until

MODEL = "org/m"
FAKE = str(Path(__file__).with_name("fake_engine.py"))
COMMAND = [sys.executable, FAKE, "--host", "{host}", "--port", "{port}", "--name", "{id}"]
Table = dict[str, Any]


def table(*more: str, **keys: Any) -> Table:
    return {
        "kind": "command",
        "command": [*COMMAND, *more],
        "env": {"FAKE_KEY": "{key}"},
        "port_range": [28100, 28899],
        "stop_timeout_secs": 2,
        **keys,
    }


@asynccontextmanager
async def neuron_with(tmp_path: Path, engine: Table, **changes: Any) -> AsyncIterator[Neuron]:
    settings = {
        "name": "test",
        "port": 0,
        "state_dir": tmp_path / "state",
        "drain_timeout_secs": 2,
        "recovery": {"backoff_secs": 0, "max_failures": 1},
        "harness": {"fake": engine},
        "simulate": {"devices": ["RTX 5090", "RTX 5090"]},
        **changes,
    }
    async with neuron_here(CheckedConfig.model_validate(settings)) as neuron:
        yield neuron


async def load(neuron: Neuron, **fields: Any) -> Answer:
    body = {"model_id": MODEL, "harness": "fake", "vram_mb": 1000, **fields}
    return await neuron.call("POST", "/models/load", json=body)


async def asked(neuron: Neuron, path: str, *, body: object = None, key: str | None = None) -> Answer:
    """What the engine itself answers at its endpoint."""
    endpoint = (await neuron.endpoint(MODEL)).body
    headers = {"Authorization": f"Bearer {key or endpoint['api_key']}"}
    async with neuron.session.request(
        "GET" if body is None else "POST", endpoint["url"] + path, json=body, headers=headers
    ) as response:
        return Answer(response.status, await response.json(), response.headers)


async def test_it_is_loaded_reached_and_unloaded(mark: str, tmp_path: Path) -> None:
    """With its key, its GPUs, the model's arguments and the operator's; its endpoint is what `/v1` is below; other keys
    are refused; its process gets the signal that its table names."""
    stopped = tmp_path / "stopped"
    engine = table(
        *("--prefix", "/api", "--stop-with", str(stopped), "--share={memory_share}", "--cores={cpu_count}"),
        api_prefix="/api/",
        stop_signal="SIGINT",
        extra_args=["--gpus", "{device_count}"],
        paths=["/v1/chat/completions"],
        keep_alive_secs=7,
        context_field="meta.n_ctx",
    )
    simulated = {"devices": ["RTX 5090", "RTX 5090"], "cores": 3}
    async with neuron_with(tmp_path, engine, simulate=simulated) as neuron:
        assert (await load(neuron, tensor_parallel=2, args=["--mine"])).status == 200
        endpoint = (await neuron.endpoint(MODEL)).body
        assert endpoint["url"].endswith("/api")
        body = {"model": MODEL, "messages": []}
        answer = await asked(neuron, "/v1/chat/completions", body=body)
        assert answer.body["choices"][0]["message"]["content"].startswith("pid ")
        assert (await asked(neuron, "/v1/chat/completions", body=body, key="other")).status == 401
        async with neuron.session.get(endpoint["url"].removesuffix("/api") + "/arguments") as response:
            started = await response.json()
        assert started["rest"] == ["--share=0.0153", "--cores=3", "--mine", "--gpus", "2"]
        assert started["env"]["CUDA_VISIBLE_DEVICES"].count(",") == 1
        entry = await neuron.model(MODEL)
        assert entry["paths"] == ["/v1/chat/completions"]
        assert entry["missing_paths"] == ["/v1/messages", "/v1/messages/count_tokens", "/v1/responses"]
        assert (entry["keep_alive_secs"], entry["max_model_len"], entry["vram_booked_mb"]) == (7, 4096, 1000)
        assert (await neuron.unload(MODEL)).status == 200
        assert stopped.read_text() == "SIGINT"
    assert marked_processes(mark) == []


async def test_an_engine_without_a_key_placeholder_gets_none(mark: str, tmp_path: Path) -> None:
    """It serves callers without a key, also if all engines should have one."""
    async with neuron_with(tmp_path, table(env={}), engine_keys="always") as neuron:
        assert (await load(neuron)).status == 200
        endpoint = (await neuron.endpoint(MODEL)).body
        assert endpoint["api_key"] is None
        async with neuron.session.get(endpoint["url"] + "/v1/models") as response:
            assert response.status == 200


async def test_it_is_not_ready_before_its_line(mark: str, tmp_path: Path) -> None:
    """Its health answers long before; progress shows the phases that its lines announce."""
    go = tmp_path / "go"
    engine = table(
        *("--say", "reading: 40 %", "--say", "now serving", "--say-when", str(go)),
        ready_pattern="now serving",
        progress=[{"pattern": r"reading: (?P<percent>\d+) %", "phase": "loading weights"}],
    )
    async with neuron_with(tmp_path, engine) as neuron:
        body = {"model_id": MODEL, "harness": "fake", "vram_mb": 1000}
        assert (await neuron.call("POST", "/models/load?wait=false", json=body)).status == 202

        async def listens() -> dict[str, Any] | None:
            entry = await neuron.model(MODEL)
            progress = entry.get("progress") or {}
            return entry if progress.get("fraction") and marked_processes(mark) else None

        entry = await until(listens)
        assert entry["status"] == "loading"
        assert (entry["progress"]["phase"], entry["progress"]["fraction"]) == ("loading weights", 0.4)
        go.touch()
        await neuron.until_status(MODEL, "loaded")


async def test_the_missing_line_is_named(mark: str, tmp_path: Path) -> None:
    """An engine whose `ready_pattern` never comes times out, and the error says what was missing."""
    engine = table("--say", "hello", ready_pattern="now serving", startup_timeout_secs=1)
    async with neuron_with(tmp_path, engine) as neuron:
        answer = await load(neuron)
        assert (answer.status, answer.error["code"]) == (504, "load_timeout")
        reason = "not ready within 1 s: no line of its output matched ready_pattern; its last line: hello"
        assert answer.error["message"].startswith(f"{reason}\nlast output lines:")


@pytest.mark.parametrize(
    ("line", "cause", "permanent"),
    [
        ("GPU 0 is full", "node", True),
        ("this model is of an unknown kind", "model", True),
        ("torch.OutOfMemoryError: CUDA out of memory", "node", False),
        ("engine: error: unrecognized arguments: --x", "model", True),
        ("ValueError: something", "unknown", False),
    ],
)
async def test_its_last_lines_say_why_it_failed(
    mark: str, tmp_path: Path, line: str, cause: str, permanent: bool
) -> None:
    """Its own patterns first, then those of any program."""
    engine = table(
        *("--say", line, "--say", "bye", "--exit", "3"),
        errors=[
            {"pattern": "is full$", "cause": "node", "permanent": True},
            {"pattern": "unknown kind", "cause": "model"},
        ],
    )
    async with neuron_with(tmp_path, engine) as neuron:
        answer = await load(neuron)
        assert answer.error["message"].startswith(line)
        entry = await neuron.model(MODEL)
        assert (entry["cause"], bool(entry["permanent"])) == (cause, permanent)


async def test_a_crash_is_survived(mark: str, tmp_path: Path) -> None:
    """kill -9: another process serves the model, with a key of its own."""
    async with neuron_with(tmp_path, table(), recovery={"backoff_secs": 0}) as neuron:
        assert (await load(neuron)).status == 200
        first = await neuron.model(MODEL)
        neuron.registry.kill_all_now()

        async def restarted() -> bool:
            entry = await neuron.model(MODEL)
            return bool(entry["status"] == "loaded" and entry["pid"] != first["pid"])

        await until(restarted)
        assert (await asked(neuron, "/v1/models")).status == 200


async def test_a_taken_port_is_not_used(mark: str, tmp_path: Path) -> None:
    """Another program listens on the first port of its range: the engine gets the second."""
    with listening_socket() as taken:
        async with neuron_with(tmp_path, table(port_range=[taken, taken + 5])) as neuron:
            assert (await load(neuron)).status == 200
            assert int((await neuron.endpoint(MODEL)).body["url"].rpartition(":")[2]) != taken


async def test_the_next_neuron_adopts_it(mark: str, tmp_path: Path) -> None:
    """The same process serves on; a neuron whose file no longer describes it ends it."""
    stays = {"on_stop": "leave_engines"}
    async with neuron_with(tmp_path, table(), **stays) as neuron:
        assert (await load(neuron)).status == 200
        pid = (await neuron.model(MODEL))["pid"]
    async with neuron_with(tmp_path, table(), **stays) as neuron:
        entry = await neuron.until_status(MODEL, "loaded")
        assert entry["pid"] == pid
        assert (await asked(neuron, "/v1/models")).status == 200
    async with neuron_with(tmp_path, table(), harness={}, **stays) as neuron:
        assert await neuron.model(MODEL) == {}
        await until(lambda: not marked_processes(mark))


async def test_its_metrics_count_its_requests(mark: str, tmp_path: Path) -> None:
    """As its table names them, of all label sets together; the page is behind its key. Without progress it hangs."""
    page = tmp_path / "metrics"
    page.write_text('# HELP x\nrun{a="1"} 2\nrun{a="2"} 1.0\nwait 4\nother 9\nwork_total 7\n')
    engine = table(
        *("--metrics", str(page)),
        activity={"running": "run", "waiting": "wait", "progress": ["work_total"]},
    )
    health = {"interval_secs": 0.05, "hang_grace_secs": 0.1, "prefill_grace_secs": 0.5}
    async with neuron_with(tmp_path, engine, health=health, recovery={"backoff_secs": 60}) as neuron:
        assert (await load(neuron)).status == 200

        async def counted() -> bool:
            listed = (await neuron.call("GET", "/health")).body["models"]
            return bool(listed) and (listed[0]["in_flight"], listed[0]["queue_depth"]) == (3, 4)

        async def hangs() -> bool:
            return "hung: 3 requests running" in str((await neuron.model(MODEL))["transitions"])

        await until(counted)
        await until(hangs)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"args": ["--port", "1"]}, "args", "'--port': --port is set by neuron"),
        ({"args": ["--remote-code"]}, "args", "allow_code = true in [harness.fake]"),
        ({"parallel": {"tensor": 1, "data": 2}}, "parallel", "has no {data_parallel}"),
        ({"served_names": ["alias"]}, "served_names", "has no {names}"),
        ({"max_model_len": 256, "args": ["-c", "512"]}, "max_model_len", "-c is in its args too"),
        ({"max_model_len": 256, "args": ["--context=512"]}, "max_model_len", "--context is in its args too"),
        ({"args": ["--context", "512"]}, None, ""),
        ({"tools": True}, None, ""),
    ],
)
async def test_what_it_cannot_do_is_refused(
    mark: str, tmp_path: Path, fields: Table, param: str | None, text: str
) -> None:
    """With the field and the reason. Tools need no argument that neuron knows of."""
    engine = table(
        "--context={context}",
        reserved_arguments=["--port"],
        code_arguments=["--remote-code"],
        context_arguments=["-c", "--context"],
    )
    async with neuron_with(tmp_path, engine) as neuron:
        answer = await load(neuron, **fields)
        if param is None:
            assert answer.status == 200
        else:
            assert (answer.status, answer.error["param"]) == (400, param)
            assert text in answer.error["message"]


async def test_default_models_use_it(mark: str, tmp_path: Path) -> None:
    """Without a harness of its own, an entry gets the only one."""
    async with neuron_with(tmp_path, table(), default_models=[{"model_id": MODEL, "vram_mb": 500}]) as neuron:
        entry = await neuron.until_status(MODEL, "loaded")
        assert entry["harness"] == "fake"
        assert (await neuron.call("GET", "/discovery")).body["harnesses"] == ["fake"]
