"""How cortex watches its neurons."""

from __future__ import annotations

from cortex.fleet.state import Fleet
from shared.protocol import Discovery, ModelView, NeuronHealth
from tests.cortex.conftest import StartCortex
from tests.cortex.fleets import replica_key
from tests.cortex.protocol_v1_neuron import V1Neuron
from tests.cortex.raw_http import until

SMALL = {"id": "org/small"}


async def test_a_silent_neuron_does_not_delay_the_others(
    start_cortex: StartCortex, benjy: V1Neuron, beast: V1Neuron
) -> None:
    """While one neuron accepts calls and never answers, the other is polled at its own pace."""
    beast.silent = True
    await start_cortex([beast, benjy], [SMALL], wait_healthy=False, poll={"timeout_secs": 30})
    await until(lambda: benjy.calls.count("/health") > 5)
    assert beast.calls.count("/health") == 1


async def test_three_misses_make_unhealthy_and_one_success_heals(start_cortex: StartCortex) -> None:
    """The discovery is fetched again when the neuron comes back."""
    async with V1Neuron("benjy", 24000).running() as benjy:
        cortex = await start_cortex([benjy], [SMALL])
        port = int(benjy.url.rpartition(":")[2])
        assert benjy.calls.count("/discovery") == 1
    fleet = cortex.parts.fleet
    await cortex.until(lambda: not fleet.snapshot().nodes["benjy"].healthy)
    assert fleet.snapshot().nodes["benjy"].misses >= 3
    async with V1Neuron("benjy", 48000).running(port) as upgraded:
        await cortex.until(lambda: fleet.snapshot().nodes["benjy"].healthy)
        assert upgraded.calls.count("/discovery") == 1
        assert fleet.snapshot().nodes["benjy"].devices[0].vram_total_mb == 48000


async def test_discovery_is_fetched_once(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """Topology does not change while a neuron lives: polls ask for health and models only."""
    await start_cortex([benjy], [SMALL])
    await until(lambda: benjy.calls.count("/health") > 5)
    assert benjy.calls.count("/discovery") == 1


async def test_model_that_is_no_longer_listed_is_gone(start_cortex: StartCortex, benjy: V1Neuron) -> None:
    """What the neuron forgets, cortex forgets."""
    benjy.models["own/model"] = "loaded"
    cortex = await start_cortex([benjy], [])
    async with cortex.chat("own/model") as response:
        assert response.status == 200
    del benjy.models["own/model"]
    await cortex.until(lambda: not cortex.parts.fleet.snapshot().nodes["benjy"].models)
    async with cortex.chat("own/model") as response:
        assert response.status == 404


def observed(fleet: Fleet, *, started: float, **models: str) -> None:
    views = [ModelView(id=model_id, status=status) for model_id, status in models.items()]
    fleet.record_poll("n", started=started, health=NeuronHealth(), models=views, discovery=Discovery())


def test_an_old_poll_does_not_undo_a_newer_report() -> None:
    """A poll that began before a load ended neither removes nor downgrades the entry; the next poll rules again."""
    now = 10.0
    fleet = Fleet([("n", "http://n")], unhealthy_after=3, clock=lambda: now)
    observed(fleet, started=1)
    fleet.loaded(replica_key("m", "n"), harness="vllm", devices=[0])
    observed(fleet, started=9)
    assert fleet.snapshot().nodes["n"].models["m"][""].status == "loaded"
    observed(fleet, started=9, m="loading")
    assert fleet.snapshot().nodes["n"].models["m"][""].status == "loaded"
    observed(fleet, started=11)
    assert not fleet.snapshot().nodes["n"].models


def test_an_engine_that_wakes_has_its_adapters() -> None:
    """Already before its neuron lists it as loaded."""
    fleet = Fleet([("n", "http://n")], unhealthy_after=3, clock=lambda: 10.0)
    asleep = ModelView(id="m", status="sleeping", max_loras=2, adapters=["x"])
    fleet.record_poll("n", started=1, health=NeuronHealth(), models=[asleep], discovery=Discovery())
    fleet.loaded(replica_key("m", "n"), harness="vllm", devices=[0])
    view = fleet.snapshot().nodes["n"].models["m"][""]
    assert (view.status, view.max_loras, view.adapters) == ("loaded", 2, ["x"])


def test_an_old_poll_does_not_bring_back_what_was_removed() -> None:
    """An answer from before the removal arrives after it."""
    fleet = Fleet([("n", "http://n")], unhealthy_after=3, clock=lambda: 10.0)
    observed(fleet, started=1, m="loaded")
    fleet.remove_model("n", "m")
    observed(fleet, started=9, m="loaded")
    assert not fleet.snapshot().nodes["n"].models


def test_snapshots_do_not_change() -> None:
    """A decision is made from one state, whatever happens in the meantime."""
    fleet = Fleet([("n", "http://n")], unhealthy_after=1)
    observed(fleet, started=1, m="loaded")
    before = fleet.snapshot()
    fleet.record_miss("n", "gone")
    assert before.nodes["n"].healthy
    assert not fleet.snapshot().nodes["n"].healthy
