"""The operator's commands: the real `python -m cortex`, talking to a cortex on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from aiohttp import web

from shared.serve import Site, bind, serving
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron

TOP = Path(__file__).parents[3]
SMALL = {"id": "org/small", "vram_mb": 4000}
LARGE = {"id": "org/large", "min_devices": 2, "vram_mb": 50000}

DRAINING = (
    "benjy is draining: it gets no new loads, and requests only for models that no other neuron has loaded. "
    "`cortex resume benjy` ends this\n"
)


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """The cells of a table, its head included."""
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in self.out.splitlines()]


async def start(
    *arguments: str, stdout: int = asyncio.subprocess.PIPE, environ: Mapping[str, str] = MappingProxyType({})
) -> asyncio.subprocess.Process:
    """The command with only `environ` of cortex's own variables, its output buffered as a user's is."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEX_", "PYTHONUNBUF"))}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cortex", *arguments),
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        cwd=TOP,
        env={**inherited, **environ},
    )


async def run(*arguments: str, **environ: str) -> Result:
    process = await start(*arguments, environ=environ)
    out, err = await process.communicate()
    assert b"Traceback" not in err, err.decode()
    assert process.returncode is not None
    return Result(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def cortex(start_cortex: StartCortex, beast: V1Neuron, benjy: V1Neuron) -> RunningCortex:
    """A cortex with two neurons, two models and an alias."""
    return await start_cortex([beast, benjy], [SMALL, LARGE], aliases={"small": "org/small"})


async def test_status(cortex: RunningCortex, beast: V1Neuron) -> None:
    """Each device has a row, each engine too; the neuron's first row has its state."""
    beast.models["org/small"] = "loaded"
    beast.used_mb[1] = 500
    fleet = cortex.parts.fleet
    await cortex.until(lambda: bool(fleet.snapshot().nodes["beast"].models))
    await cortex.until(lambda: fleet.snapshot().nodes["beast"].device_health[1].vram_used_mb == 500)
    result = await run("status", "--url", cortex.url)
    assert (result.status, result.err) == (0, "")
    assert result.rows == [
        ["NODE", "STATE", "DEVICES", "MODELS"],
        ["beast", "healthy", "0: GPU 0/32000 MiB", "org/small on 0 (loaded)"],
        ["1: GPU 500/32000 MiB"],
        ["benjy", "healthy", "0: GPU 0/24000 MiB", "-"],
    ]


async def test_status_as_json(cortex: RunningCortex) -> None:
    """The output is what GET /fleet answers, unchanged."""
    result = await run("status", "--json", "--url", cortex.url)
    assert result.status == 0
    assert [node["name"] for node in result.json["nodes"]] == ["beast", "benjy"]
    keys = {"nodes", "loads", "in_flight", "waiting", "last_used", "held", "models", "aliases", "configuration"}
    assert set(result.json) == keys | {"warnings"}


async def test_status_shows_loads_and_lost_neurons(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """The output has the loads in progress with their reason, and the last error of an unreachable neuron."""
    benjy.load_gate.clear()
    async with V1Neuron("gone", 1000).running() as gone:
        pass
    cortex = await start_cortex([benjy, gone], [SMALL], wait_healthy=False)
    await cortex.until(lambda: cortex.parts.fleet.snapshot().nodes["benjy"].healthy)
    await cortex.until(lambda: cortex.parts.fleet.snapshot().nodes["gone"].misses > 0)
    loading = await start("load", "org/small", "--url", cortex.url)
    await benjy.load_started.wait()
    result = await run("status", "--url", cortex.url)
    assert "gone" in result.out
    assert re.search(r"down since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: connection refused", result.out)
    assert ["LOADING", "ON", "PHASE", "REASON"] in result.rows
    assert any(row[:2] == ["org/small", "benjy"] for row in result.rows)
    benjy.load_gate.set()
    await loading.communicate()
    assert loading.returncode == 0


async def test_models(cortex: RunningCortex) -> None:
    """Each model is shown with its locations and feasible neurons; an alias names its model."""
    result = await run("models", "--url", cortex.url)
    assert result.status == 0
    assert result.rows == [
        ["MODEL", "LOADED", "FEASIBLE ON", "WHERE"],
        ["org/small", "no", "beast, benjy", "-"],
        ["org/large", "no", "beast", "-"],
        ["small", "no", "beast, benjy", "-", "alias of org/small"],
    ]
    listed = (await run("models", "--json", "--url", cortex.url)).json
    assert [entry["id"] for entry in listed["data"]] == ["org/small", "org/large", "small"]


async def test_explain(cortex: RunningCortex) -> None:
    """The output has the decision in a line with its devices, then each neuron with its reason."""
    result = await run("explain", "org/large", "--url", cortex.url)
    assert result.status == 0
    head, because, _, *rows = result.out.splitlines()
    assert (
        because == "  devices: device 0 has 32000 MiB free, device 1 has 32000 MiB free; connected by an unknown path"
    )
    assert head.startswith("org/large: load on beast, devices [0, 1]: beast: fits now")
    assert rows[0].split() == ["NODE", "FEASIBLE", "STATUS", "DEVICES", "REASON"]
    assert rows[1].split()[:5] == ["beast", "yes", "-", "0", "1"]
    assert "needs 2 devices, has 1" in rows[2]
    assert rows[-1].startswith("Clients cannot offer it tools: set tools = true")
    plan = (await run("explain", "small", "--json", "--url", cortex.url)).json
    assert (plan["model"], plan["decision"]["action"], plan["decision"]["evict"]) == ("org/small", "load", [])


async def test_explain_of_an_unknown_model(cortex: RunningCortex) -> None:
    """The command exits with 1 and says why the model would be refused."""
    result = await run("explain", "org/unknown", "--url", cortex.url)
    assert result.status == 1
    assert result.out.startswith("org/unknown: refuse: the model 'org/unknown' does not exist")


async def test_explain_of_an_unknown_model_without_a_neuron(start_cortex: StartCortex) -> None:
    """It exits with 1 too; of a model of the catalogue it explains that no neuron is healthy, and exits with 0."""
    async with V1Neuron("gone", 1000).running() as gone:
        pass
    cortex = await start_cortex([gone], [SMALL], wait_healthy=False)
    await cortex.until(lambda: cortex.parts.fleet.snapshot().nodes["gone"].misses > 0)
    for model, status in (("org/unknown", 1), ("org/small", 0)):
        result = await run("explain", model, "--url", cortex.url)
        assert (result.status, "no neuron is healthy" in result.out) == (status, True)


async def test_load_and_unload(cortex: RunningCortex, beast: V1Neuron, benjy: V1Neuron) -> None:
    """A model is loaded where the planner chooses or on the named neuron; an alias works too."""
    result = await run("load", "small", "--url", cortex.url)
    assert result.status == 0
    assert re.fullmatch(r"org/small is loaded on benjy in \d+\.\d s\n", result.out)
    assert benjy.models == {"org/small": "loaded"}
    result = await run("load", "org/small", "--on", "beast", "--json", "--url", cortex.url)
    assert (result.status, result.json["node"]) == (0, "beast")
    assert beast.loads[0]["model_id"] == "org/small"
    result = await run("unload", "org/small", "--on", "benjy", "--url", cortex.url)
    assert (result.status, result.out) == (0, "org/small is unloaded from benjy\n")
    assert (benjy.models, list(beast.models)) == ({}, ["org/small"])
    assert (await run("unload", "org/small", "--url", cortex.url)).status == 0
    assert beast.models == {}


async def test_a_restart_and_what_it_would_do(cortex: RunningCortex, benjy: V1Neuron) -> None:
    benjy.models = {"org/small": "loaded"}
    await cortex.until(lambda: bool(cortex.parts.fleet.snapshot().serving("org/small")))
    result = await run("restart", "small", "--dry-run", "--url", cortex.url)
    assert (result.status, benjy.unloads) == (0, [])
    assert result.out.startswith("org/small is started again on benjy, GPU 0: no request is running there.\n")
    result = await run("restart", "small", "--url", cortex.url)
    assert (result.status, result.out) == (0, "small is loaded on benjy\n")
    assert (benjy.unloads, len(benjy.loads)) == (["org/small"], 1)


async def test_unload_for_some_time(cortex: RunningCortex) -> None:
    """The hold shows in status until the model is loaded again."""
    result = await run("unload", "small", "--for", "1h30m", "--url", cortex.url)
    assert result.status == 0
    assert result.out.startswith("org/small is not loaded\nit is held back until ")
    assert ["org/small", "every neuron", "1 h 30 min"] in (await run("status", "--url", cortex.url)).rows
    assert (await run("load", "small", "--url", cortex.url)).status == 0
    assert "HELD BACK" not in (await run("status", "--url", cortex.url)).out
    result = await run("unload", "small", "--for", "2 weeks", "--url", cortex.url)
    assert (result.status, "write it as 2h" in result.err) == (2, True)


async def test_load_again_does_nothing(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """A loaded model is reported at once, without a request to a neuron."""
    await run("load", "org/small", "--url", cortex.url)
    result = await run("load", "org/small", "--json", "--url", cortex.url)
    assert (result.status, result.json) == (0, {"status": "loaded", "model": "org/small", "node": "benjy"})
    assert len(benjy.loads) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("load", "org/unknown"), "the model 'org/unknown' does not exist"),
        (("load", "org/large", "--on", "benjy"), "benjy cannot hold 'org/large': needs 2 devices, has 1"),
        (("load", "org/small", "--on", "nowhere"), "unknown neuron 'nowhere' (known: beast, benjy)"),
        (("unload", "org/small"), "no healthy neuron has 'org/small' loaded"),
        (("unload", "org/small", "--on", "beast"), "beast does not have 'org/small' loaded"),
        (("drain", "nowhere"), "unknown neuron 'nowhere'"),
        (("drain", "nowhere", "--json"), "unknown neuron 'nowhere'"),
        (("resume", "a/b"), "unknown neuron 'a/b'"),
    ],
)
async def test_refusals(cortex: RunningCortex, arguments: tuple[str, ...], message: str) -> None:
    """The command exits with 1, with cortex's message on standard error and nothing on standard output."""
    result = await run(*arguments, "--url", cortex.url)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"cortex: {message}")


async def test_failed_load_says_why(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """The command shows the neuron's reason and exits with 1; a second one tries again despite the backoff."""
    benjy.load_error = (500, {"error": "CUDA out of memory"})
    for attempt in (1, 2):
        result = await run("load", "org/small", "--on", "benjy", "--url", cortex.url)
        assert result.status == 1
        assert "CUDA out of memory" in result.err
        assert len(benjy.loads) == attempt


async def test_drain_and_resume(cortex: RunningCortex, beast: V1Neuron, benjy: V1Neuron) -> None:
    """A drained neuron gets no new model, its state shows, and resume undoes it."""
    result = await run("drain", "benjy", "--url", cortex.url)
    assert (result.status, result.out) == (0, DRAINING)
    assert ["benjy", "healthy, draining", "0: GPU 0/24000 MiB", "-"] in (await run("status", "--url", cortex.url)).rows
    assert (await run("load", "org/small", "--url", cortex.url)).status == 0
    assert (len(beast.loads), benjy.loads) == (1, [])
    result = await run("resume", "benjy", "--json", "--url", cortex.url)
    assert (result.status, result.json) == (0, {"node": "benjy", "draining": False})
    assert not cortex.parts.fleet.snapshot().nodes["benjy"].draining


async def test_url_from_the_environment(cortex: RunningCortex) -> None:
    """CORTEX_URL is the default, --url wins; a trailing slash is allowed."""
    assert (await run("models", CORTEX_URL=f"{cortex.url}/")).status == 0
    assert (await run("models", "--url", cortex.url, CORTEX_URL="http://127.0.0.1:1")).status == 0


@contextlib.asynccontextmanager
async def other_server(text: str, seen: list[str]) -> AsyncIterator[str]:
    """A server other than cortex: answers everything with `text`, and appends each Authorization header to `seen`."""

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization", ""))
        return web.Response(text=text, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    site = Site(app, bind("127.0.0.1", 0))
    async with serving([site], drain_timeout_secs=0):
        yield f"http://127.0.0.1:{site.port}"


async def test_api_key_is_sent() -> None:
    """CORTEX_API_KEY is sent as a bearer token; without it no header is sent."""
    seen: list[str] = []
    async with other_server('{"data": []}', seen) as url:
        assert (await run("models", "--url", url, CORTEX_API_KEY="the key")).status == 0
        assert (await run("models", "--url", url)).status == 0
    assert seen == ["Bearer the key", ""]


@pytest.mark.parametrize("text", ['{"data": [{"id": "x", "object": "model"}]}', "[]", '"x"', "null", "no json"])
async def test_server_other_than_cortex(text: str) -> None:
    """The command prints one line on standard error, no traceback."""
    async with other_server(text, []) as url:
        result = await run("models", "--url", url)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("cortex: ")
    assert url in result.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:port", "file:///etc/passwd", "127.0.0.1", ""])
async def test_unreachable(url: str) -> None:
    """The command exits with 1 and one line with the URL; only http and https are supported."""
    result = await run("status", "--url", url)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("cortex: ")
    assert url in result.err
    assert len(result.err.splitlines()) == 1


async def test_server_without_http() -> None:
    """A port where another protocol answers gets the same message."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail ready\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        result = await run("status", "--url", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert result.status == 1
    assert result.err.startswith("cortex: http://127.0.0.1")


async def test_ctrl_c_leaves_a_load_alone(cortex: RunningCortex, benjy: V1Neuron) -> None:
    """The command ends with 130 and without a traceback; the load goes on."""
    benjy.load_gate.clear()
    process = await start("load", "org/small", "--url", cortex.url)
    await benjy.load_started.wait()
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"")
    benjy.load_gate.set()
    snapshot = cortex.parts.fleet.snapshot
    await cortex.until(lambda: snapshot().nodes["benjy"].is_loaded("org/small"))


async def test_closed_output_pipe(cortex: RunningCortex) -> None:
    """`cortex models | head -0` prints no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = await start("models", "--url", cortex.url, stdout=writer)
    finally:
        os.close(writer)
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("load",), ("drain",), ("status", "--bad")])
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    """The command exits with 2 and prints the usage."""
    result = await run(*arguments)
    assert result.status == 2
    assert "Usage: cortex" in result.err


async def test_version_and_help() -> None:
    """Both say what this is and exit with 0."""
    assert (await run("--version")).out.startswith("cortex 0.")
    result = await run("--help")
    for command in ("serve", "dev", "status", "models", "explain", "load", "unload", "drain", "resume", "check"):
        assert command in result.out


@pytest.mark.parametrize("program", ["cortex", "neuron"])
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_import_little(program: str, option: str) -> None:
    """Start-up stays fast: no server, configuration or hub library is imported."""
    heavy = {"aiohttp", "asyncio", "huggingface_hub", "msgspec", "pydantic", "rich", "urllib.request", "uvloop"}
    code = (
        f"import sys; from {program}.__main__ import main; status = main([{option!r}])\n"
        f"print(status, sorted({heavy!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(("load", "org/s"), "org/small"), (("drain", "be"), "beast"), (("load", "x", "--on", ""), "benjy")],
)
async def test_completion_offers_names(cortex: RunningCortex, arguments: tuple[str, ...], names: str) -> None:
    """Model and node names come from the running cortex; without one nothing is offered."""
    variables = {"_CORTEX_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("cortex", *arguments))}
    variables["COMP_CWORD"] = str(len(arguments))
    assert names in (await run(CORTEX_URL=cortex.url, **variables)).out.split()
    assert (await run(CORTEX_URL="http://127.0.0.1:1", **variables)).out.strip() == ""
