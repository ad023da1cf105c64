"""A neuron with `dial = "out"`: cortex never connects to its host, and everything works as with any other."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from neuron.api.dialling import IDLE_CONNECTIONS
from tests.certificates import authority_file, pair, trusting
from tests.cortex.cortex_process import CortexProcess, cortex_process
from tests.far_host import far_host
from tests.neuron.conftest import mark
from tests.neuron.neurons import NeuronProcess, neuron_process, toml_config, until
from tests.ports import free_port

__all__ = ["mark"]

MODEL = "org/model"
MODELS = [{"id": MODEL, "harness": "sim", "vram_mb": 4000}]
TOKEN = "registration-secret"
BROKER = "cortex.fleet.members.dialled"


def broker_of(cortex: CortexProcess) -> psutil.Process | None:
    for child in psutil.Process(cortex.process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie, which was just killed
            if BROKER in child.cmdline():
                return child
    return None


def connected_ports(cortex: CortexProcess) -> set[int]:
    """The ports that any process of this cortex has connections to."""
    root = psutil.Process(cortex.process.pid)
    found = [each for process in (root, *root.children()) for each in process.net_connections("tcp")]
    return {each.raddr.port for each in found if each.status != psutil.CONN_LISTEN}


@dataclass(frozen=True)
class Host:
    """A directory with the files of a cortex and of a neuron that dials it."""

    directory: Path
    port: int
    address: str = "127.0.0.1"  # cortex's, for the neuron
    tls: bool = False

    @contextlib.asynccontextmanager
    async def cortex(self, **options: Any) -> AsyncIterator[CortexProcess]:
        (self.directory / "token").write_text(TOKEN, encoding="utf-8")
        discovery = {
            "kind": "register",
            "registration_token_file": str(self.directory / "token"),
            "dial_listen": "0.0.0.0:0",
        }
        if self.tls:
            options |= pair(self.directory).gateway
        async with cortex_process(
            self.directory,
            [],
            MODELS,
            host="0.0.0.0",
            port=self.port,
            discovery=discovery,
            unhealthy_after=2,
            allow_anonymous=True,
            **options,
        ) as started:
            yield started

    @contextlib.asynccontextmanager
    async def neuron(self, *prefix: str, on_stop: str = "stop_engines") -> AsyncIterator[NeuronProcess]:
        """Started by the command `prefix`."""
        directory = self.directory / "gpu"
        directory.mkdir(exist_ok=True)
        file = toml_config(
            directory, 'name = "Far.Host"', "port = 0", f'state_dir = "{directory / "state"}"', f'on_stop = "{on_stop}"'
        )
        with file.open("a", encoding="utf-8") as toml:
            urls = f'urls = ["{"https" if self.tls else "http"}://{self.address}:{self.port}"]'
            token = f'token_file = "{self.directory / "token"}"'
            ca = f'ca = "{authority_file(self.directory)}"'
            toml.write("\n".join(("[cortex]", urls, token, ca, 'dial = "out"', "interval_secs = 0.3")))
        async with neuron_process(file, prefix=prefix) as started:
            yield started


@pytest.fixture
def host(mark: str, tmp_path: Path) -> Host:
    return Host(tmp_path, free_port())


async def completion(http: aiohttp.ClientSession, url: str, **options: Any) -> Any:
    body = {"model": MODEL, "prompt": "say it", "max_tokens": 20, "temperature": 0, **options}
    async with http.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
        assert response.status == 200, text
        return text if options.get("stream") else json.loads(text)


def texts_of(stream: str) -> list[str]:
    events = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    return [choice["text"] for event in events for choice in json.loads(event)["choices"]]


async def test_everything_goes_through_the_connections_of_the_neuron(host: Host) -> None:
    """With two workers: a cold load, a stream, logs, a client that leaves, and the death of the broker."""
    async with aiohttp.ClientSession() as http, host.cortex(workers=2) as cortex, host.neuron() as neuron:
        await until(lambda: _is_known(http, cortex))
        through = texts_of(await completion(http, cortex.url, stream=True))
        [view] = (await neuron.call("GET", "/models")).body
        engine_url, key = view["endpoint"]["url"], view["endpoint"]["api_key"]
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers) as at_engine:
            assert through == texts_of(await completion(at_engine, engine_url.removesuffix("/v1"), stream=True))
        ports = {urlsplit(neuron.base).port, urlsplit(engine_url).port}
        assert not ports & connected_ports(cortex)
        async with http.get(f"{cortex.url}/fleet/logs", params={"model": MODEL}) as logs:
            assert logs.status == 200

        before = _streams(cortex)
        long = {"model": MODEL, "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        for _ in range(2):
            async with http.post(f"{cortex.url}/v1/completions", json=long) as response:
                assert response.status == 200
                await response.content.readany()
                await until(lambda: _in_flight(neuron, 1))
                response.close()
            await until(lambda: _in_flight(neuron, 0))
        await until(lambda: _streams(cortex) <= before)

        killed = broker_of(cortex)
        assert killed is not None
        killed.kill()
        await until(lambda: broker_of(cortex) not in (None, killed))
        await until(lambda: _is_known(http, cortex))
        assert (await completion(http, cortex.url))["usage"]["completion_tokens"] == 20
    assert "Traceback" not in cortex.log()
    assert "Traceback" not in neuron.log.read_text()


async def test_a_stopping_neuron_lets_answers_finish(host: Host) -> None:
    """They pass through its process, which waits for them as it does for those of any engine. Here with TLS."""
    host = replace(host, tls=True)
    trusts = aiohttp.TCPConnector(ssl=trusting())
    long = {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession(connector=trusts) as http, host.cortex() as cortex, host.neuron() as neuron:
        await until(lambda: _is_known(http, cortex))
        async with http.post(f"{cortex.url}/v1/completions", json=long) as response:
            first = await response.content.readany()
            neuron.process.send_signal(signal.SIGTERM)
            stream = (first + await response.read()).decode()
        assert len(texts_of(stream)) == 400
        assert stream.endswith("data: [DONE]\n\n")


async def test_restarts_of_either_side(host: Host) -> None:
    """The engine outlives its neuron, and both sides find each other again."""
    async with aiohttp.ClientSession() as http, contextlib.AsyncExitStack() as stack:
        async with host.cortex() as cortex:
            neuron = await stack.enter_async_context(host.neuron(on_stop="leave_engines"))
            await until(lambda: _is_known(http, cortex))
            await completion(http, cortex.url)
            pid = (await neuron.model(MODEL))["pid"]
            await neuron.stop(signal.SIGKILL)
            neuron = await stack.enter_async_context(host.neuron())
            await until(lambda: _is_known(http, cortex))
            await completion(http, cortex.url)
            assert (await neuron.model(MODEL))["pid"] == pid
        async with host.cortex() as cortex:
            await until(lambda: _is_known(http, cortex))
            await completion(http, cortex.url)
            assert (await neuron.model(MODEL))["pid"] == pid


async def test_a_host_without_an_open_port_vanishes_and_comes_back(host: Host) -> None:
    """It listens on its own loopback only. While it has vanished, all its connections stay open."""
    with far_host() as far:
        host = replace(host, address=far.near_address)
        prefix = ("ip", "netns", "exec", far.name)
        async with aiohttp.ClientSession() as http, host.cortex() as cortex, host.neuron(*prefix):
            await until(lambda: _is_known(http, cortex))
            await completion(http, cortex.url)
            far.vanish()
            await until(lambda: _is_away(http, cortex))
            far.come_back()
            await until(lambda: _is_known(http, cortex))
            await completion(http, cortex.url)


async def test_a_cortex_without_the_key_says_which_one_is_missing(host: Host) -> None:
    (host.directory / "token").write_text(TOKEN, encoding="utf-8")
    discovery = {"kind": "register", "registration_token_file": str(host.directory / "token")}
    async with (
        cortex_process(host.directory, [], MODELS, port=host.port, discovery=discovery),
        host.neuron() as neuron,
    ):
        await until(lambda: "[discovery] dial_listen" in neuron.log.read_text())


async def _is_known(http: aiohttp.ClientSession, cortex: CortexProcess) -> bool:
    async with http.get(f"{cortex.url}/fleet") as response:
        nodes = (await response.json())["nodes"]
    return [(node["name"], node["endpoint"], node["healthy"]) for node in nodes] == [
        ("Far.Host", "dial://Far.Host", True)
    ]


async def _is_away(http: aiohttp.ClientSession, cortex: CortexProcess) -> bool:
    async with http.get(f"{cortex.url}/fleet") as response:
        return not any(node["healthy"] for node in (await response.json())["nodes"])


async def _in_flight(neuron: NeuronProcess, count: int) -> bool:
    health = (await neuron.call("GET", "/health")).body
    return sum(int(each["in_flight"]) for each in health["models"]) == count


def _streams(cortex: CortexProcess) -> int:
    """Connections of the neuron that are in use, or no longer of use and still open."""
    broker = broker_of(cortex)
    assert broker is not None
    return len([each for each in broker.net_connections("tcp") if each.status != psutil.CONN_LISTEN]) - IDLE_CONNECTIONS
