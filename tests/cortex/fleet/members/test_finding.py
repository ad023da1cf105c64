"""A cortex that finds neurons, over real sockets and the system's resolver."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cortex.config.catalogue import Catalogue
from cortex.config.settings import CortexConfig
from cortex.control.wiring import running_control
from cortex.fleet.members import dns, found
from cortex.fleet.members.dns import DnsDiscovery
from cortex.fleet.members.membership import Membership
from cortex.fleet.state import Fleet
from cortex.fleet.store import StateFile
from cortex.upstream.pool import EnginePool
from shared.protocol import Registration
from tests.cortex.conftest import RunningCortex, StartCortex
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.neuron.neurons import config_of, neuron_here

MODEL = {"id": "org/small", "vram_mb": 4000}
SECRET = "a registration token"


@pytest.fixture
def registering(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`[discovery]` of a cortex that takes registrations, whose token is in the environment."""
    monkeypatch.setenv("REGISTRATION_TOKEN", SECRET)
    return {"kind": "register", "registration_token_env": "REGISTRATION_TOKEN"}


async def register(cortex: RunningCortex, bearer: str | None = SECRET, **fields: Any) -> tuple[int, Any]:
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    async with cortex.http.post(f"{cortex.url}/fleet/register", json=fields, headers=headers) as answer:
        return answer.status, await answer.json()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS and neurons may take as long as a busy machine needs."""
    for module in (dns, found):
        monkeypatch.setattr(module, "TIMEOUT_SECS", 60.0)


def no_neuron(cortex: RunningCortex) -> bool:
    return not cortex.parts.fleet.snapshot().nodes


async def healthy(cortex: RunningCortex, *names: str) -> None:
    await cortex.until(lambda: {node.name for node in cortex.parts.fleet.snapshot().healthy} == set(names))


async def test_a_registered_neuron_serves_until_it_stops_registering(
    start_cortex: StartCortex, benjy: V1Neuron, registering: dict[str, Any]
) -> None:
    """Without an entry in cortex.toml. A name that an answering neuron has is refused to another one."""
    cortex = await start_cortex([], [MODEL], discovery=registering, poll={"timeout_secs": 60})
    status, answer = await register(cortex, name="benjy", endpoint=benjy.url, interval_secs=3600)
    assert (status, answer["name"]) == (200, "benjy")
    await healthy(cortex, "benjy")
    async with cortex.chat("org/small") as response:
        assert (response.status, response.headers["x-cortex-node"]) == (200, "benjy")

    status, answer = await register(cortex, name="benjy", endpoint="http://127.0.0.1:9", instance_id="other")
    assert (status, answer["error"]["code"]) == (409, "neuron_name_taken")
    assert benjy.url in answer["error"]["message"]

    await register(cortex, name="benjy", endpoint=benjy.url, interval_secs=0.1)
    await cortex.until(partial(no_neuron, cortex))
    assert cortex.parts.clients == {}


async def test_registered_neurons_survive_a_restart_of_cortex(
    benjy: V1Neuron, registering: dict[str, Any], tmp_path: Path
) -> None:
    """With their tokens, in a file that is this user's alone; not after they have expired, nor with another kind."""
    config = CortexConfig.model_validate({"discovery": registering})
    wanted = Registration(name="benjy", endpoint=benjy.url, token="its own", instance_id="p", interval_secs=10)
    async with running_control(config, Catalogue(), state=StateFile(tmp_path)) as parts:
        assert parts.registrations is not None
        parts.registrations.register(wanted)
        parts.registrations.register(wanted.model_copy(update={"name": "gone", "endpoint": "http://127.0.0.1:9"}))
    path = tmp_path / "state.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["registrations"][1]["expires_at"] = 1.0
    path.write_text(json.dumps(stored), encoding="utf-8")

    async with running_control(config, Catalogue(), state=StateFile(tmp_path)) as parts:
        assert list(parts.clients) == ["benjy"]
        (kept,) = parts.state.registrations
        assert (kept.token, kept.process) == ("its own", "p")
    async with running_control(CortexConfig(), Catalogue(), state=StateFile(tmp_path)) as parts:
        assert parts.clients == {}
    assert "its own" not in path.read_text(encoding="utf-8")


async def test_what_is_not_registered(start_cortex: StartCortex, registering: dict[str, Any]) -> None:
    """A wrong token, also where clients need keys, and what cannot be an entry: nothing of it reaches the fleet."""
    cortex = await start_cortex([], [MODEL], discovery=registering, keys="me:user:sk-cortex-0123456789abcdef")
    good = {"name": "a", "endpoint": "http://127.0.0.1:9"}
    assert (await register(cortex, None, **good))[0] == 401
    assert (await register(cortex, "wrong", **good))[0] == 401
    for wrong in ({"name": "no name"}, {"endpoint": "ftp://x"}, {"endpoint": "http://x/é"}, {"token": "a\nb"}):
        assert (await register(cortex, **{**good, **wrong}))[0] == 400
    assert cortex.parts.fleet.snapshot().nodes == {}
    assert (await register(cortex, **good))[0] == 200


async def test_the_registration_token_is_renewed_without_a_gap(start_cortex: StartCortex, tmp_path: Path) -> None:
    """While cortex's file has both, each of them is good."""
    file, wanted = tmp_path / "tokens", {"name": "a", "endpoint": "http://127.0.0.1:9"}
    table = {"kind": "register", "registration_token_file": str(file)}
    file.write_text("old\nnew\n", encoding="utf-8")
    cortex = await start_cortex([], [], discovery=table)
    assert [(await register(cortex, token, **wanted))[0] for token in ("old", "new", "oldnew", "")] == [
        200,
        200,
        401,
        401,
    ]
    file.write_text("new\n", encoding="utf-8")
    assert [(await register(cortex, token, **wanted))[0] for token in ("old", "new")] == [401, 200]


async def test_registration_has_to_be_turned_on(start_cortex: StartCortex) -> None:
    """404, which neuron's log shows with the setting to change."""
    status, answer = await register(await start_cortex([], [MODEL]), name="a", endpoint="http://127.0.0.1:9")
    assert status == 404
    assert "[discovery]" in answer["error"]["message"]


async def test_neuron_announces_itself(start_cortex: StartCortex, registering: dict[str, Any], tmp_path: Path) -> None:
    """With its name and the token that it expects, to each cortex that it knows; when it has ended, they forget it. Of
    several registration tokens it sends the first."""
    (tmp_path / "token").write_text(f"# today's\n\n{SECRET}\nyesterday's\n", encoding="utf-8")
    cortexes = [await start_cortex([], [], discovery=registering) for _ in range(2)]
    cortex_table = {
        "urls": [cortex.url for cortex in cortexes],
        "token_file": tmp_path / "token",
        "interval_secs": 1,
    }
    async with neuron_here(config_of(tmp_path / "state", name="gpu1", token="its own", cortex=cortex_table)):
        await asyncio.gather(*(healthy(cortex, "gpu1") for cortex in cortexes))
    for cortex in cortexes:
        await cortex.until(partial(no_neuron, cortex))


@pytest.mark.usefixtures("patient")
async def test_neurons_are_found_by_dns(benjy: V1Neuron) -> None:
    """When cortex begins to serve, those that a name has are in the fleet."""
    port = int(benjy.url.rpartition(":")[2])
    config = CortexConfig.model_validate({"discovery": {"kind": "dns", "host": "localhost", "port": port}})
    async with running_control(config, Catalogue()) as parts:
        assert [node.endpoint for node in parts.fleet.snapshot().nodes.values()] == [benjy.url]
        assert list(parts.clients) == ["benjy"]


@pytest.mark.usefixtures("patient")
async def test_neurons_come_and_go_with_their_addresses(benjy: V1Neuron, caplog: pytest.LogCaptureFixture) -> None:
    """An address that does not answer is asked again; one that DNS drops leaves after the grace period, and stays while
    DNS does not answer."""
    port, now = int(benjy.url.rpartition(":")[2]), 0.0
    answers: list[Sequence[str] | OSError] = [["127.0.0.1"], ["127.0.0.1"], OSError("try again"), [], []]
    answers += [["127.0.0.1"], [], ["127.0.0.1"], ["127.0.0.1"]]

    async def scripted(host: str, asked_port: int) -> Sequence[str]:
        assert (host, asked_port) == ("neurons", port)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    settings = CortexConfig.model_validate({"discovery": {"kind": "dns", "host": "neurons", "port": port}}).discovery
    fleet, pool = Fleet([], unhealthy_after=3), EnginePool(5)
    membership = Membership(pool, fleet)
    neurons = found.FoundNeurons(settings, membership, fleet, pool, grace_secs=60, clock=lambda: now)
    discovery = DnsDiscovery(settings, neurons, resolve=scripted)
    try:
        benjy.rewrite = lambda answer: []
        await discovery.look()
        assert list(membership.clients) == []
        assert caplog.text.count("cannot be used yet") == 1
        benjy.rewrite = None
        await discovery.look()
        assert list(membership.clients) == ["benjy"]
        now = 100.0
        await discovery.look()
        assert "try again" in caplog.text
        now = 159.0
        await discovery.look()
        assert list(membership.clients) == ["benjy"]
        now = 160.0
        await discovery.look()
        assert list(membership.clients) == []

        benjy.rewrite = lambda answer: []
        await discovery.look()
        assert caplog.text.count("cannot be used yet") == 2
        now = 260.0
        await discovery.look()  # it is gone, and with it what was said of it
        await discovery.look()
        assert caplog.text.count("cannot be used yet") == 3
        benjy.rewrite = lambda answer: {**answer, "name": "no name"} if isinstance(answer, dict) else answer
        await discovery.look()
        assert list(membership.clients) == ["benjy"]
        assert "'no name' cannot be used" in caplog.text
    finally:
        await membership.close()
        pool.close()
