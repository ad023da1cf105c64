"""Configuration reloads of a running cortex: a real process, edited files, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cortex.cli.serve import reloader_of
from cortex.config.catalogue import Catalogue
from cortex.config.diff import difference
from cortex.config.files import ConfigurationFiles
from cortex.config.settings import CortexConfig
from tests.cortex.conftest import StartCortex
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_engine import RawEngine, Received, stream_head
from tests.cortex.raw_http import Answer, Wire, bounded, connected, request, until
from tests.processes import descendants

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SMALL = {"id": "org/small", "vram_mb": 4000}
OTHER = {"id": "org/other", "vram_mb": 4000}


class Cortex:
    """A running cortex with its configuration files."""

    def __init__(self, process: CortexProcess, directory: Path) -> None:
        self.process = process
        self.directory = directory
        self._reloads = 0

    @property
    def log(self) -> str:
        return self.process.log()

    def write(self, name: str, data: dict[str, Any]) -> None:
        (self.directory / name).write_text(tomli_w.dumps(data), encoding="utf-8")

    def edit_config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Edits cortex.toml in place."""
        data = tomllib.loads((self.directory / "cortex.toml").read_text(encoding="utf-8"))
        change(data)
        self.write("cortex.toml", data)

    def set_neurons(self, *neurons: V1Neuron, **more: str) -> None:
        entries = [{"name": neuron.name, "endpoint": neuron.url, **more} for neuron in neurons]
        self.edit_config(lambda data: data.update(neurons=entries))

    def set_models(self, *models: dict[str, Any], **aliases: str) -> None:
        self.write("models.toml", {"models": list(models), "aliases": aliases})

    async def reload(self) -> str:
        """Sends SIGHUP; returns the changes that the log reports."""
        self.process.process.send_signal(signal.SIGHUP)
        return await self.reloaded()

    async def reloaded(self) -> str:
        """The changes that the log reports at the next reload."""
        self._reloads += 1
        await until(lambda: self.log.count("configuration reloaded: ") >= self._reloads)
        await self._logged()
        return str(re.findall(r"configuration reloaded: (.*)", self.log)[self._reloads - 1])

    async def refused(self) -> None:
        """Sends SIGHUP and waits until the files are rejected."""
        before = self.log.count("configuration not reloaded")
        self.process.process.send_signal(signal.SIGHUP)
        await until(lambda: self.log.count("configuration not reloaded") > before)
        await self._logged()

    async def _logged(self) -> None:
        """Returns when the log has every line of a reload that has begun to log: cortex writes them without a pause and
        answers afterwards."""
        await self.get("/fleet")

    async def ask(self, model: str) -> Answer:
        """A completion on its own connection."""
        async with connected(self.process.url) as client:
            return await client.ask(request(json.dumps({"model": model}).encode()))

    async def get(self, target: str) -> Any:
        async with connected(self.process.url) as client:
            return json.loads((await client.ask(request(method="GET", target=target))).body)

    async def post(self, target: str) -> Any:
        async with connected(self.process.url) as client:
            return json.loads((await client.ask(request(b"{}", target=target))).body)

    async def node(self, name: str) -> dict[str, Any] | None:
        return next((node for node in (await self.get("/fleet"))["nodes"] if node["name"] == name), None)

    async def until_healthy(self, name: str) -> None:
        await self.until_node(name, lambda node: bool(node["healthy"]))

    async def until_loaded(self, name: str, model: str) -> None:
        await self.until_node(name, lambda node: model in [view["id"] for view in node["models"]])

    async def until_node(self, name: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        async def seen() -> None:
            while (node := await self.node(name)) is None or not condition(node):  # noqa: ASYNC110 - other process
                await asyncio.sleep(0.02)

        await bounded(seen())


@contextlib.asynccontextmanager
async def running(
    directory: Path, neurons: list[V1Neuron], models: list[dict[str, Any]], **settings: Any
) -> AsyncIterator[Cortex]:
    async with cortex_process(directory, neurons, models, **settings) as process:
        await until(lambda: "cortex listening" in process.log())
        yield Cortex(process, directory)


@pytest.fixture(params=[1, 2], ids=["one-worker", "two-workers"])
async def cortex(
    request: pytest.FixtureRequest, tmp_path: Path, benjy: V1Neuron, beast: V1Neuron
) -> AsyncIterator[Cortex]:
    """A cortex with two neurons and one model."""
    async with running(tmp_path, [benjy, beast], [SMALL], workers=request.param) as cortex:
        yield cortex


@pytest.fixture
async def single(tmp_path: Path, benjy: V1Neuron, beast: V1Neuron) -> AsyncIterator[Cortex]:
    """The same with one worker only."""
    async with running(tmp_path, [benjy, beast], [SMALL]) as cortex:
        yield cortex


@contextlib.asynccontextmanager
async def held_stream(cortex: Cortex, neuron: V1Neuron, model: str) -> AsyncIterator[asyncio.Event]:
    """A started stream from an engine of this neuron; it ends after the event is set and must be complete."""
    go_on = asyncio.Event()

    async def answer(wire: Wire, received: Received) -> None:
        await wire.send(stream_head() + b"9\r\ndata: 1\n\n\r\n")
        await bounded(go_on.wait())
        await wire.send(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async with RawEngine().running() as engine:
        engine.scripts.append(answer)
        neuron.models[model] = "loaded"
        neuron.engine_url = engine.url
        await cortex.until_loaded(neuron.name, model)
        async with connected(cortex.process.url) as client:
            await client.send(request(json.dumps({"model": model}).encode()))
            head = await client.head()
            assert " 200 " in head.start
            yield go_on
            go_on.set()
            assert b"data: [DONE]" in await bounded(client.incoming.readuntil(b"0\r\n\r\n"))
        neuron.engine_url = None


async def test_a_new_model_and_an_alias_can_be_asked_for(cortex: Cortex) -> None:
    """The log lists the changes in one line, value by value; with several workers, each applies them."""
    assert (await cortex.ask("fresh")).status == 404
    cortex.set_models({**SMALL, "vram_mb": 5000, "args": ["-x"]}, OTHER, fresh="org/other")
    assert await cortex.reload() == (
        "+model org/other, model org/small: vram_mb 4000 -> 5000, args [] -> ['-x'], +alias fresh"
    )
    answers = await asyncio.gather(*(cortex.ask("fresh") for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert {json.loads(answer.body)["model"] for answer in answers} == {"org/other"}
    assert [entry["id"] for entry in (await cortex.get("/v1/models"))["data"]] == ["org/small", "org/other", "fresh"]
    cortex.set_models({**SMALL, "vram_mb": 5000}, OTHER, fresh="org/small")
    assert await cortex.reload() == "model org/small: args ['-x'] -> [], alias fresh: org/other -> org/small"
    answers = await asyncio.gather(*(cortex.ask("fresh") for _ in range(20)))
    assert {json.loads(answer.body)["model"] for answer in answers} == {"org/small"}


def write_in_pieces(path: Path, text: str) -> None:
    """Writes as a slow editor does, or a copy over a network."""
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(text), 40):
            file.write(text[start : start + 40])
            file.flush()
            time.sleep(0.02)


def write_and_rename(path: Path, text: str) -> None:
    """Replaces the file as editors do."""
    fresh = path.with_name("other")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def swap_link(path: Path, text: str) -> None:
    """As Kubernetes mounts a ConfigMap: the file links into `..data`, itself a link to a directory."""
    directory = path.parent / f"..{time.monotonic_ns()}"
    directory.mkdir()
    (directory / path.name).write_text(text, encoding="utf-8")
    data = path.parent / "..data_tmp"
    data.symlink_to(directory.name)
    data.replace(path.parent / "..data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(Path("..data") / path.name)


@pytest.mark.parametrize("write", [write_in_pieces, write_and_rename, swap_link])
async def test_changed_files_are_noticed(single: Cortex, write: Callable[[Path, str], None]) -> None:
    """Works for every way of writing a file, once it is complete; and again, since the second time is a different
    file."""
    for number in (1, 2):
        text = tomli_w.dumps({"models": [SMALL, *({**OTHER, "id": f"org/{n}"} for n in range(number))]})
        await asyncio.to_thread(write, single.directory / "models.toml", text)
        assert await single.reloaded() == f"+model org/{number - 1}"
    assert "not reloaded" not in single.log


async def test_another_catalogue_file_is_read_and_watched(single: Cortex) -> None:
    """A new catalogue file applies and is watched as soon as cortex.toml names it."""
    single.write("other.toml", {"models": [OTHER]})
    single.edit_config(lambda data: data.update(models_config="other.toml"))
    assert await single.reload() == ("+model org/other, -model org/small, models_config models.toml -> other.toml")
    assert (await single.get("/fleet"))["configuration"]["files"][1] == str(single.directory / "other.toml")
    single.write("other.toml", {"models": [OTHER, SMALL]})
    assert await single.reloaded() == "+model org/small"


async def test_touched_files_change_nothing(single: Cortex, benjy: V1Neuron) -> None:
    """Rewriting a file with the same content changes nothing."""
    os.utime(single.directory / "cortex.toml")
    assert await single.reloaded() == "no changes"
    assert benjy.calls.count("/discovery") == 1


async def test_a_bad_file_changes_nothing_and_says_why(single: Cortex) -> None:
    """Every mistake in both files is in the log and in the fleet view until it is fixed. Nothing from the files is
    applied, even the valid parts, and requests continue."""
    before = (await single.get("/fleet"))["configuration"]
    assert before["error"] is None
    assert before["files"] == [str(single.directory / name) for name in ("cortex.toml", "models.toml")]
    single.set_models(OTHER, {**SMALL, "size": 1}, gone="nowhere")
    single.edit_config(lambda data: data.update(poll={"interval_secs": -1}, neurons=[]))
    await single.refused()
    problems = re.findall(r"ERROR .*configuration not reloaded: (.*)", single.log)
    assert [problem.partition(" = ")[0] for problem in problems] == [
        f"{single.directory}/cortex.toml: poll.interval_secs",
        f"{single.directory}/models.toml: models[1].size: unknown key (value 1)",
    ]
    assert (await single.ask("org/small")).status == 200
    fleet = await single.get("/fleet")
    assert [node["name"] for node in fleet["nodes"]] == ["benjy", "beast"]
    assert [model["id"] for model in fleet["models"]] == ["org/small"]
    assert fleet["configuration"] == {**before, "error": "\n".join(problems)}
    assert problems[0] in await status_of(single)
    single.edit_config(lambda data: data.update(poll={"interval_secs": 0.05}, neurons=data["neurons"]))
    single.set_models(OTHER)
    (single.directory / "cortex.toml").unlink()
    await single.refused()
    assert "cortex.toml: No such file or directory" in (await single.get("/fleet"))["configuration"]["error"]
    single.write("cortex.toml", {"neurons": [{"name": n["name"], "endpoint": n["endpoint"]} for n in fleet["nodes"]]})
    await single.reload()
    after = (await single.get("/fleet"))["configuration"]
    assert after["error"] is None
    assert after["loaded_at"] > before["loaded_at"]
    assert "mistakes" not in await status_of(single)


async def status_of(cortex: Cortex) -> str:
    """The output of `cortex status`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex", "status", "--url", cortex.process.url), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await bounded(process.communicate())
    return out.decode()


async def test_an_unrelated_edit_touches_nothing(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Running streams and loads continue; no neuron receives extra commands."""
    async with held_stream(cortex, beast, "org/streaming") as go_on:
        benjy.load_gate.clear()
        asking = asyncio.create_task(cortex.ask("org/small"))
        await bounded(benjy.load_started.wait())
        cortex.set_models({**SMALL, "vram_mb": 5000}, OTHER)
        cortex.edit_config(lambda data: data.update(poll={"interval_secs": 0.04}))
        cortex.edit_config(lambda data: data["neurons"][0].update(network="rack1", network_gbps=100))
        assert "neuron benjy: network None -> rack1, network_gbps None -> 100" in await cortex.reload()
        assert [load["model"] for load in (await cortex.get("/fleet"))["loads"]] == ["org/small"]
        benjy.load_gate.set()
        assert (await bounded(asking)).status == 200
        go_on.set()
    assert (len(benjy.loads), len(beast.loads)) == (1, 0)
    assert (benjy.unloads, beast.unloads) == ([], [])
    assert (benjy.calls.count("/discovery"), beast.calls.count("/discovery")) == (1, 1)


async def test_a_neuron_that_is_removed_is_left_alone(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Its running stream completes, its models stay loaded, polling stops, and new requests go elsewhere."""
    async with held_stream(cortex, benjy, "org/small") as go_on:
        cortex.set_neurons(beast)
        assert await cortex.reload() == "-neuron benjy"
        assert [node["name"] for node in (await cortex.get("/fleet"))["nodes"]] == ["beast"]
        answer = await cortex.ask("org/small")
        assert (answer.status, answer.get("x-cortex-node")) == (200, "beast")
        assert benjy.models == {"org/small": "loaded"}
        calls = len(benjy.calls)
        await until(lambda: beast.calls.count("/health") > beast.calls.count("/discovery") + 5)
        assert len(benjy.calls) <= calls + 2, "a poll that was under way"
        go_on.set()
    assert benjy.unloads == []
    assert "Traceback" not in cortex.log


async def test_a_load_on_a_removed_neuron_moves_to_another(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """A waiting request does not notice, and the reserved memory is free again when the neuron returns."""
    benjy.load_gate.clear()
    asking = asyncio.create_task(cortex.ask("org/small"))
    await bounded(benjy.load_started.wait())
    cortex.set_neurons(beast)
    await cortex.reload()
    answer = await bounded(asking)
    assert (answer.status, answer.get("x-cortex-node"), answer.get("x-cortex-cold-start")) == (200, "beast", "true")
    cortex.set_neurons(beast, benjy)
    assert await cortex.reload() == "+neuron benjy"
    await cortex.until_healthy("benjy")
    plan = await cortex.get("/fleet/explain?model=org/small")
    assert {node["node"]: node["spare_mb"] for node in plan["nodes"]}["benjy"] == 24000 - 4000
    assert "Traceback" not in cortex.log


async def test_an_operators_load_on_a_removed_neuron_fails(single: Cortex, benjy: V1Neuron) -> None:
    """A load on the removed neuron is not recorded as successful."""
    benjy.load_gate.clear()
    body = json.dumps({"model": "org/small", "node": "benjy"}).encode()
    async with connected(single.process.url) as client:
        await client.send(request(body, target="/fleet/load"))
        await bounded(benjy.load_started.wait())
        single.edit_config(lambda data: data.update(neurons=[]))
        await single.reload()
        answer = await client.answer()
    assert answer.status == 503
    assert "benjy was removed from the configuration" in json.loads(answer.body)["error"]["message"]


async def test_a_neuron_that_is_added_serves(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """The new neuron is polled at once; the others are not polled again."""
    async with V1Neuron("quad", 16000).running() as quad:
        cortex.set_neurons(benjy, quad, beast)
        assert await cortex.reload() == "+neuron quad"
        await cortex.until_healthy("quad")
        assert [node["name"] for node in (await cortex.get("/fleet"))["nodes"]] == ["benjy", "quad", "beast"]
        answer = await cortex.ask("org/small")
        assert (answer.status, answer.get("x-cortex-node")) == (200, "quad")
        assert (benjy.calls.count("/discovery"), beast.calls.count("/discovery")) == (1, 1)


async def test_a_neuron_at_another_endpoint(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Only its polling restarts; no request fails meanwhile, and none reaches the old engine afterwards."""
    benjy.models["org/small"] = "loaded"
    await cortex.until_loaded(benjy.name, "org/small")
    assert (await cortex.ask("org/small")).status == 200
    async with V1Neuron("benjy", 48000).running() as moved:
        moved.models["org/small"] = "loaded"
        cortex.set_neurons(moved, beast)
        enough = asyncio.Event()
        asking = asyncio.create_task(keep_asking(cortex, "org/small", enough))
        assert await cortex.reload() == f"neuron benjy: endpoint {benjy.url} -> {moved.url}"
        await cortex.until_node("benjy", lambda node: bool(node["devices"][0]["vram_total_mb"] == 48000))
        await until(lambda: moved.calls.count("/models/org/small/endpoint") > 0)
        enough.set()
        assert {answer.status for answer in await asking} == {200}
        served = len(benjy.engine.requests)
        assert {(await cortex.ask("org/small")).status for _ in range(6)} == {200}
        assert len(benjy.engine.requests) == served
        assert len(moved.engine.requests) > 0
    assert beast.calls.count("/discovery") == 1
    assert benjy.unloads == []


async def keep_asking(cortex: Cortex, model: str, enough: asyncio.Event) -> list[Answer]:
    """Sends requests one after another until stopped; returns all answers."""
    answers = [await cortex.ask(model)]
    while not enough.is_set():
        answers.append(await cortex.ask(model))
    return answers


async def test_another_token_is_sent_from_now_on(single: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """The token goes to that neuron only and never into the log. Its known state is kept, and a running load
    continues."""
    benjy.load_gate.clear()
    asking = asyncio.create_task(single.ask("org/small"))
    await bounded(benjy.load_started.wait())
    single.edit_config(lambda data: data["neurons"][0].update(token="s3cret-word"))
    assert await single.reload() == "neuron benjy: token changed"
    assert (await single.get("/health"))["status"] == "ok"
    await until(lambda: "Bearer s3cret-word" in benjy.shown)
    benjy.load_gate.set()
    assert (await bounded(asking)).status == 200
    assert set(beast.shown) == {None}
    assert len(benjy.loads) == 1
    assert "s3cret-word" not in single.log


async def test_a_removed_model_serves_as_long_as_it_is_loaded(cortex: Cortex, benjy: V1Neuron) -> None:
    """It becomes a model that only a neuron knows: a new catalogue unloads nothing."""
    assert (await cortex.ask("org/small")).status == 200
    cortex.set_models(OTHER)
    assert await cortex.reload() == "+model org/other, -model org/small"
    assert (await cortex.ask("org/small")).status == 200
    (entry,) = [entry for entry in (await cortex.get("/v1/models"))["data"] if entry["id"] == "org/small"]
    assert (entry["loaded"], entry["feasible_on"]) == (True, [])
    assert (len(benjy.loads), benjy.unloads) == (1, [])
    async with connected(cortex.process.url) as client:
        await client.ask(request(b'{"model": "org/small"}', target="/fleet/unload"))
    assert (await cortex.ask("org/small")).status == 404


async def test_a_worker_that_starts_later_gets_the_current_settings(tmp_path: Path, benjy: V1Neuron) -> None:
    """The worker gets the current settings, not those read at startup."""
    async with running(tmp_path, [benjy], [SMALL], workers=2) as cortex:
        cortex.set_models(SMALL, fresh="org/small")
        await cortex.reload()
        await until(lambda: cortex.log.count(" is process ") == 2)
        for pid in descendants(cortex.process.process.pid):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: cortex.log.count(" is process ") == 4)
        assert {(await cortex.ask("fresh")).status for _ in range(6)} == {200}


async def test_workers_ignore_the_hangup_signal(tmp_path: Path, benjy: V1Neuron) -> None:
    """A signal to the whole process group is handled by the control process."""
    async with running(tmp_path, [benjy], [SMALL], workers=2) as cortex:
        for pid in descendants(cortex.process.process.pid):
            os.kill(pid, signal.SIGHUP)
        cortex.set_models(SMALL, OTHER)
        await cortex.reload()
        assert (await cortex.ask("org/small")).status == 200
        assert "restarting in" not in cortex.log


@pytest.mark.parametrize("workers", [1, 2])
async def test_new_waiting_settings_hold_for_new_requests(tmp_path: Path, benjy: V1Neuron, workers: int) -> None:
    """Every worker answers a waiting stream as early, and comments as often, as the new configuration says."""
    body = json.dumps({"model": "org/small", "stream": True}).encode()

    async def wait_for_comments(cortex: Cortex) -> None:
        async with connected(cortex.process.url) as client:
            await client.send(request(body))
            assert " 200 " in (await client.head()).start
            await bounded(client.incoming.readuntil(b"\n\r\n"))
            await bounded(client.incoming.readuntil(b"\n\r\n"))

    late = {"first_comment_secs": 3600, "comment_interval_secs": 3600}
    async with running(tmp_path, [benjy], [SMALL], workers=workers, waiting=late) as cortex:
        cortex.edit_config(lambda data: data.update(waiting=dict.fromkeys(late, 0.02)))
        assert await cortex.reload() == (
            "waiting.first_comment_secs 3600 -> 0.02, waiting.comment_interval_secs 3600 -> 0.02"
        )
        benjy.load_gate.clear()
        await asyncio.gather(*(wait_for_comments(cortex) for _ in range(6)))
        benjy.load_gate.set()


async def test_new_routing_settings_hold_for_new_requests(cortex: Cortex, benjy: V1Neuron, beast: V1Neuron) -> None:
    """Every worker keeps the sessions of the new header together, each on one engine, and uses both engines."""
    for neuron in (benjy, beast):
        neuron.models["org/small"] = "loaded"
        await cortex.until_loaded(neuron.name, "org/small")
    cortex.edit_config(
        lambda data: data.update(routing={"session_header": "x-talk", "prefix_chars": 0, "load_factor": 100.0})
    )
    assert await cortex.reload() == (
        "routing.session_header x-session-id -> x-talk, routing.prefix_chars 256 -> 0, routing.load_factor 1.25 -> 100"
    )

    async def node_of(session: int) -> str | None:
        async with connected(cortex.process.url) as client:
            answer = await client.ask(request(b'{"model": "org/small"}', f"x-talk: {session}"))
            return answer.get("x-cortex-node")

    rounds: list[list[str | None]] = []
    for _ in range(5):  # on a busy machine a neuron may count as down for a moment
        rounds = [[await node_of(session) for session in range(8)] for _ in range(4)]
        if rounds == 4 * rounds[:1] and set(rounds[0]) == {"benjy", "beast"}:
            return
    pytest.fail(f"the sessions do not stay together: {rounds}")


async def test_what_needs_a_restart_is_named_and_left_alone(single: Cortex) -> None:
    """The rest of the same edit applies; each reload repeats the warning until the key is restored."""
    gateway = {"listen": "127.0.0.1:1", "metrics_listen": "127.0.0.1:0", "workers": 3}
    single.edit_config(lambda data: data.update(gateway=gateway, state_dir="elsewhere", cold_load={"timeout_secs": 7}))
    assert await single.reload() == "cold_load.timeout_secs 1800 -> 7"
    await single.reload()
    warnings = re.findall(r"WARNING .*configuration: (.*) takes effect after a restart", single.log)
    assert warnings == 2 * [
        "state_dir None -> elsewhere",
        "gateway.listen 127.0.0.1:31313 -> 127.0.0.1:1",
        "gateway.workers 1 -> 3",
    ]
    assert (await single.ask("org/small")).status == 200


async def test_new_poll_settings_hold_for_new_polls(tmp_path: Path, benjy: V1Neuron) -> None:
    """New poll settings apply even during a long pause between polls."""
    async with cortex_process(tmp_path, [benjy], [SMALL], poll_secs=3600) as process:
        await until(lambda: "cortex listening" in process.log())
        cortex = Cortex(process, tmp_path)
        calls = len(benjy.calls)
        cortex.edit_config(lambda data: data.update(poll={"interval_secs": 0.02, "unhealthy_after": 1}))
        await cortex.reload()
        await until(lambda: len(benjy.calls) > calls + 10)
        benjy.silent = True
        cortex.edit_config(lambda data: data["poll"].update(timeout_secs=0.1))
        await cortex.reload()
        await until(lambda: "neuron benjy is unhealthy after 1 failed polls" in cortex.log)


async def test_a_drain_outlives_a_kill(tmp_path: Path, benjy: V1Neuron, beast: V1Neuron) -> None:
    """An acknowledged drain survives `kill -9` and the neuron's absence until it is resumed."""
    async with running(tmp_path, [benjy, beast], [SMALL]) as cortex:
        assert await cortex.post("/fleet/nodes/benjy/drain") == {"node": "benjy", "draining": True}
    async with running(tmp_path, [benjy, beast], [SMALL]) as cortex:
        assert [node["draining"] for node in (await cortex.get("/fleet"))["nodes"]] == [True, False]
        assert (await cortex.ask("org/small")).get("x-cortex-node") == "beast"
        cortex.set_neurons(beast)
        await cortex.reload()
        await until(lambda: "drained neurons that are not in the configuration" in cortex.log)
        cortex.set_neurons(beast, benjy)
        await cortex.reload()
        assert [node["draining"] for node in (await cortex.get("/fleet"))["nodes"]] == [False, True]
    async with running(tmp_path, [beast], [SMALL]) as cortex:
        assert "(`cortex resume NODE` drops one): benjy" in cortex.log
        assert await cortex.post("/fleet/nodes/benjy/resume") == {"node": "benjy", "draining": False}
        assert "error" in await cortex.post("/fleet/nodes/benjy/resume")
        assert "error" in await cortex.post("/fleet/nodes/benjy/drain")
    async with running(tmp_path, [benjy, beast], [SMALL]) as cortex:
        assert [node["draining"] for node in (await cortex.get("/fleet"))["nodes"]] == [False, False]


async def test_a_drain_that_cannot_be_kept_says_so(tmp_path: Path, benjy: V1Neuron) -> None:
    """It lasts as long as this cortex process."""
    (tmp_path / "in-the-way").write_text("", encoding="utf-8")
    async with running(tmp_path, [benjy], [SMALL], state_dir="in-the-way/state") as cortex:
        answer = await cortex.post("/fleet/nodes/benjy/drain")
        assert (answer["draining"], answer["warning"]) == (True, "will not survive a restart: Not a directory")
        assert (await cortex.get("/fleet"))["nodes"][0]["draining"]


def test_a_changed_variant_is_named() -> None:
    """With its keys, as those of a model are."""
    before, after = (
        Catalogue.model_validate({"models": [{**SMALL, "variants": variants}]})
        for variants in (
            [{"quant": "fp8", "vram_mb": 4000}, {"quant": "awq"}],
            [{"quant": "gptq"}, {"quant": "fp8", "vram_mb": 5000, "args": ["-x"]}],
        )
    )
    found = difference(CortexConfig(), before, CortexConfig(), after)
    assert str(found) == (
        "model org/small: variants ['fp8', 'awq'] -> ['gptq', 'fp8'], variants.fp8.vram_mb 4000 -> 5000, "
        "variants.fp8.args None -> ['-x']"
    )


def test_a_large_catalogue_is_read_and_compared_quickly(tmp_path: Path) -> None:
    """A change of all 5,000 models takes well under a second, off the event loop."""
    (tmp_path / "cortex.toml").write_text("", encoding="utf-8")
    files = ConfigurationFiles(tmp_path / "cortex.toml")
    models = [{**SMALL, "id": f"org/{number}", "min_devices": 2, "args": ["-a", "b"]} for number in range(5000)]
    (tmp_path / "models.toml").write_text(tomli_w.dumps({"models": models}), encoding="utf-8")
    config, catalogue = files.read()
    for model in models:
        model["vram_mb"] = 5000
    (tmp_path / "models.toml").write_text(tomli_w.dumps({"models": models}), encoding="utf-8")
    before = time.process_time()
    found = difference(config, catalogue, *files.read())
    assert time.process_time() - before < 0.9
    assert len(found.lines) == 5000
    assert str(found).endswith(" and 4960 more")
    again = difference(found.config, found.catalogue, *files.read())
    assert again.catalogue is found.catalogue
    assert again.config is found.config
    assert again.lines == ()


class HeldFiles(ConfigurationFiles):
    """Reading them ends when `go` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reading, self.go = threading.Event(), threading.Event()

    def look(self) -> tuple[CortexConfig, Catalogue]:
        self.reading.set()
        self.go.wait(60)
        return super().look()


async def test_a_reload_whose_client_leaves_is_done_again(start_cortex: StartCortex, tmp_path: Path) -> None:
    """The files count as read then: without it no look at them would find a change."""
    for name in ("cortex.toml", "models.toml"):
        (tmp_path / name).write_text("", encoding="utf-8")
    parts, files, asked = (await start_cortex([], [])).parts, HeldFiles(tmp_path / "cortex.toml"), asyncio.Event()
    reloader = reloader_of(parts, files, asked)
    reloading = asyncio.create_task(reloader.reload())
    await asyncio.to_thread(files.reading.wait, 60)
    reloading.cancel()
    await asyncio.wait([reloading])
    files.go.set()
    assert not files.differ_from_what_was_read(files.stamps())
    assert asked.is_set()
