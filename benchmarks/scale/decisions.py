"""How long cortex's decisions take on a large fleet: calls the functions in this process, without sockets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.scale.neurons import PretendedNeuron
from cortex.api.models import ModelList
from cortex.config.catalogue import Catalogue
from cortex.control.decision import decide
from cortex.fleet.snapshot import FleetSnapshot
from cortex.fleet.state import Fleet
from cortex.placement.fair_queue import schedule_loads
from cortex.placement.inputs import PlanningView, WaitingRequests
from shared.protocol import Discovery, ModelView, NeuronHealth

LOADED_SHARE = 0.8
"""Share of the catalogue's models that are loaded somewhere."""
REPLICATED = 10
"""Models loaded on every fiftieth neuron."""
_WARM_UP = 50


@dataclass(frozen=True)
class DecisionTimes:
    """Results for one fleet and one catalogue. A decision is for a loaded model, a placement for one that is not
    loaded."""

    nodes: int
    devices: int
    models: int
    decision_p50_us: float
    decision_p99_us: float
    placement_p50_us: float
    placement_p99_us: float
    list_changed_ms: float  # `/v1/models`, after a model's state changed
    list_same_ms: float  # after polls without changes
    list_mib: float


def time_decisions(
    nodes: int, models: int, *, devices: int = 2, decisions: int = 20_000, placements: int = 200
) -> DecisionTimes:
    """Measures everything. Each decision is timed on its own. `devices` are those of each neuron."""
    catalogue = Catalogue.model_validate({"models": [{"id": name(n), "vram_mb": 6000} for n in range(models)]})
    fleet = Fleet([(f"n{node:04d}", f"http://n{node}") for node in range(nodes)], unhealthy_after=3)
    loaded = max(1, int(models * LOADED_SHARE))
    for node in range(nodes):
        poll(
            fleet,
            node,
            devices,
            {*range(node, loaded, nodes), *(range(min(REPLICATED, loaded)) if node % 50 == 0 else ())},
        )
    snapshot = fleet.snapshot()
    served = timed(lambda n: decision(name(n * 7919 % loaded), catalogue, snapshot), range(decisions))
    placed = timed(lambda n: placement(name(loaded + n % (models - loaded)), catalogue, snapshot), range(placements))
    listing, size = ModelList(), 0
    changed: list[float] = []
    same: list[float] = []
    for number in range(20):
        status = "sleeping" if number % 2 else "loaded"
        fleet.update_model(
            f"n{number % nodes:04d}", ModelView(id=name(number % nodes), status=status, vram_used_mb=number + 1)
        )
        changed += timed(lambda _: listing.blocks(catalogue, fleet.snapshot(), created=0), [number], warm_up=0)
        poll(fleet, 0, devices, None)
        same += timed(lambda _: listing.blocks(catalogue, fleet.snapshot(), created=0), [number], warm_up=0)
        size = sum(map(len, listing.blocks(catalogue, fleet.snapshot(), created=0)))
    return DecisionTimes(
        nodes=nodes,
        devices=devices,
        models=models,
        decision_p50_us=statistics.median(served) * 1e6,
        decision_p99_us=p99(served) * 1e6,
        placement_p50_us=statistics.median(placed) * 1e6,
        placement_p99_us=p99(placed) * 1e6,
        list_changed_ms=statistics.median(changed[1:]) * 1000,
        list_same_ms=statistics.median(same[1:]) * 1000,
        list_mib=size / 2**20,
    )


def decision(model_id: str, catalogue: Catalogue, snapshot: FleetSnapshot) -> None:
    """Cost of a request outside the routing tables, before anything is sent."""
    decide(model_id, catalogue, snapshot, lambda _: 0)


def placement(model_id: str, catalogue: Catalogue, snapshot: FleetSnapshot) -> None:
    """Cost of placing a model that a request waits for."""
    schedule_loads(
        PlanningView(now=10.0, catalogue=catalogue, fleet=snapshot, waiting={model_id: WaitingRequests(1, 9.0)})
    )


def name(number: int) -> str:
    return f"bench/model-{number:04d}"


def poll(fleet: Fleet, node: int, devices: int, models: Iterable[int] | None) -> None:
    """One successful poll; with `models` None, of the health only."""
    pretended = PretendedNeuron(node, 0, protocol_v1=False, devices=devices)
    views = None if models is None else [ModelView(id=name(n), status="loaded", since=1.0) for n in sorted(models)]
    fleet.record_poll(
        f"n{node:04d}",
        started=time.monotonic(),
        health=NeuronHealth.model_validate(pretended.health()),
        models=views,
        discovery=Discovery.model_validate(pretended.discovery),
    )


def timed(work: Callable[[int], object], numbers: Iterable[int], *, warm_up: int = _WARM_UP) -> list[float]:
    """Seconds of each call."""
    took: list[float] = []
    for number in (*range(warm_up), *numbers):
        began = time.perf_counter()
        work(number)
        took.append(time.perf_counter() - began)
    return took[warm_up:]


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]
