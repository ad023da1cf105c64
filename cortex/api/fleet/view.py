"""The fleet as JSON for operators. A neuron is rendered again only after it has changed."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from cortex.accounts.storage import Storage
from cortex.api.model_shapes import told_facts
from cortex.config.catalogue import Catalogue
from cortex.config.live import LiveConfig
from cortex.control.admission_queue import AdmissionQueue
from cortex.control.demand import Demand
from cortex.control.loads.loader import Loader
from cortex.control.scheduler import Scheduler
from cortex.fleet.snapshot import NodeSnapshot
from cortex.fleet.state import Fleet
from cortex.metrics.rates import Rates
from cortex.metrics.worker_counts import CountTotals
from cortex.routing.replica import ANY_NODE, ReplicaKey

MIN_INTERVAL_SECS = 0.25
"""Minimum time between two events for one listener: a large fleet changes hundreds of times a second."""

USE_STEP_SECS = 10
"""The last use of a model is told in these steps: a busy one is used all the time, and each step is a change."""

SAME_START_SECS = 5.0
"""A neuron whose start seems to differ by less was not started again: polls take time."""


class FleetView:
    """`GET /fleet`, and what `/fleet/events` sends. Times are Unix seconds, memory in MiB."""

    def __init__(
        self,
        *,
        live: LiveConfig,
        fleet: Fleet,
        loader: Loader,
        scheduler: Scheduler,
        queue: AdmissionQueue,
        counts: CountTotals,
        demand: Demand,
        storage: Storage,
    ) -> None:
        self._live = live
        self._fleet = fleet
        self._loader = loader
        self._scheduler = scheduler
        self._queue = queue
        self._counts = counts
        self._demand = demand
        self._storage = storage
        self._nodes: dict[str, tuple[NodeSnapshot, dict[str, msgspec.Raw]]] = {}
        self._catalogue: tuple[Catalogue, dict[str, msgspec.Raw]] | None = None
        self._event: tuple[int, float, bytes] | None = None  # fleet version, time, event
        self._rates = Rates()
        self._keyed_nodes: dict[str, tuple[NodeSnapshot, dict[str, Any]]] = {}
        self._keyed_catalogue: tuple[Catalogue, dict[str, Any]] | None = None

    def body(self) -> bytes:
        """The current view."""
        fleet = self._fleet.snapshot()
        nodes = [{**self._node(node), "uptime_secs": _uptime(node)} for node in fleet.nodes.values()]
        if len(self._nodes) > len(fleet.nodes):
            self._nodes = {name: known for name, known in self._nodes.items() if name in fleet.nodes}
        held = [{**each, "remaining_secs": round(each["until"] - time.time(), 1)} for each in self._held()]
        rest = {
            "loads": self._loads(),
            "in_flight": self._in_flight(),
            "waiting": self._waiting(),
            "last_used": self._last_used(),
            "held": held,
            "warnings": self._storage.warnings,
            "configuration": self._configuration(),
        }
        return msgspec.json.encode({"nodes": nodes, **rest, **self._of_catalogue(self._live.catalogue)})

    async def count(self) -> None:
        """Brings the rates of the models up to now."""
        await self._counts.refresh()
        self._rates.look(self._counts.counters(), time.monotonic())

    def keyed(self) -> dict[str, Any]:
        """The current view with objects in the place of lists, so that a merge patch can name what changed: nodes,
        models and waiting by name, devices by index, engines, loads and counts by `model@node/instance`. Times are
        points in time, since durations change without a change of the fleet."""
        nodes: dict[str, tuple[NodeSnapshot, dict[str, Any]]] = {}
        for name, node in self._fleet.snapshot().nodes.items():
            known = self._keyed_nodes.get(name)
            if known is None or known[0] is not node:
                before = None if known is None else known[1]["up_since"]
                known = node, _keyed_node(node, before)
            nodes[name] = known
        self._keyed_nodes = nodes
        catalogue = self._live.catalogue
        if self._keyed_catalogue is None or self._keyed_catalogue[0] is not catalogue:
            models = {profile.id: profile.model_dump(mode="json", exclude_none=True) for profile in catalogue.models}
            self._keyed_catalogue = catalogue, models
        return {
            "nodes": {name: known[1] for name, known in nodes.items()},
            "loads": _by_place(self._loads()),
            "in_flight": _by_place(self._in_flight()),
            "waiting": {each["model"]: each for each in self._waiting()},
            "last_used": self._last_used(),
            "rates": {model: rate._asdict() for model, rate in self._rates.rates(time.monotonic()).items()},
            "held": {f"{each['model']}@{each['node'] or ''}": each for each in self._held()},
            "warnings": self._storage.warnings,
            "configuration": self._configuration(),
            "models": self._keyed_catalogue[1],
            "aliases": dict(catalogue.targets),
        }

    def _loads(self) -> list[dict[str, Any]]:
        return [
            {
                "model": job.model_id,
                **place(job.plan.key),
                "started": job.started,
                "reason": job.reason,
                "because": job.why,
                "phase": job.phase,
                "evict": [each.resident.key.model_id for each in job.plan.eviction_plan.evictions],
            }
            for job in self._loader.jobs()
        ]

    def _in_flight(self) -> list[dict[str, Any]]:
        return [
            {"model": key.model_id, **place(key), "count": count}
            for key, count in sorted(self._counts.all_in_flight().items())
        ]

    def _waiting(self) -> list[dict[str, Any]]:
        return [
            {"model": model, "count": waiting.count, "for": self._scheduler.wait_reason(model)}
            for model, waiting in sorted(self._queue.waiting().items())
        ]

    def _last_used(self) -> dict[str, int]:
        return {
            model: USE_STEP_SECS * int(at / USE_STEP_SECS) for model, at in sorted(self._demand.last_uses().items())
        }

    def _held(self) -> list[dict[str, Any]]:
        return [
            {"model": model, "node": None if node == ANY_NODE else node, "until": until}
            for (model, node), until in sorted(self._scheduler.held_back.items())
        ]

    def _configuration(self) -> dict[str, Any]:
        live = self._live
        return {"loaded_at": live.loaded_at, "files": list(live.files), "error": live.error}

    def event(self) -> tuple[int, bytes]:
        """The fleet's version and its view as a server-sent event. Listeners share one event until it is outdated."""
        now, version = time.monotonic(), self._fleet.version
        known = self._event
        if known is None or known[0] != version or now - known[1] >= MIN_INTERVAL_SECS:
            known = self._event = version, now, b"event: fleet\ndata: " + self.body() + b"\n\n"
        return known[0], known[2]

    def _node(self, node: NodeSnapshot) -> dict[str, msgspec.Raw]:
        known = self._nodes.get(node.name)
        if known is None or known[0] is not node:
            known = self._nodes[node.name] = node, _encoded(_node(node))
        return known[1]

    def _of_catalogue(self, catalogue: Catalogue) -> dict[str, msgspec.Raw]:
        if self._catalogue is None or self._catalogue[0] is not catalogue:
            models = [profile.model_dump(exclude_none=True) for profile in catalogue.models]
            self._catalogue = catalogue, _encoded({"models": models, "aliases": dict(catalogue.targets)})
        return self._catalogue[1]


FLEET_VIEW = web.AppKey("fleet_view", FleetView)


def place(key: ReplicaKey) -> dict[str, str]:
    """Where an engine is, for an answer. A neuron with one engine for each model has no names for them."""
    return {"node": key.node, **({"instance": key.instance} if key.instance else {})}


def _by_place(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {_name(entry["model"], entry["node"], entry.get("instance")): entry for entry in entries}


def _name(model: str, node: str, instance: str | None) -> str:
    return f"{model}@{node}/{instance}" if instance else f"{model}@{node}"


def _keyed_node(node: NodeSnapshot, up_since: float | None) -> dict[str, Any]:
    """`up_since`: the last one, kept as long as it is about right."""
    now = _uptime(node)
    if now is not None and (up_since is None or abs(time.time() - now - up_since) > SAME_START_SECS):
        up_since = round(time.time() - now)
    fields = _node(node)
    return {
        **fields,
        "up_since": up_since,
        "devices": {str(device["index"]): device for device in fields["devices"]},
        "models": {_name(view["id"], node.name, view.get("instance")): view for view in fields["models"]},
    }


def _encoded(fields: dict[str, Any]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def _uptime(node: NodeSnapshot) -> float | None:
    """Extrapolated from the last `health`, which a poll without changes does not update."""
    if node.health is None:
        return None
    since = time.monotonic() - node.health_at if node.healthy else 0.0
    return round(node.health.uptime_secs + since, 3)


def _host(node: NodeSnapshot) -> dict[str, Any] | None:
    """The host's RAM and cores; None if its neuron does not count the RAM."""
    known = None if node.discovery is None else node.discovery.host
    if known is None or not known.ram_total_mb:
        return None
    live = None if node.health is None else node.health.host
    return {**known.model_dump(), **({} if live is None else live.model_dump())}


def _node(node: NodeSnapshot) -> dict[str, Any]:
    """Everything about a node except its uptime and the keys of its engines."""
    discovery = node.discovery
    live = node.device_health
    return {
        "name": node.name,
        "endpoint": node.endpoint,
        "healthy": node.healthy,
        "draining": node.draining,
        "misses": node.misses,
        "last_error": node.last_error,
        "silent_since": node.silent_since,
        "ignored_fields": node.ignored_fields,
        "hostname": discovery and discovery.hostname,
        "version": discovery and discovery.version,
        "simulated": discovery and discovery.simulated,
        "harnesses": discovery.harnesses if discovery else [],
        "cuda_unavailable_reason": discovery and discovery.cuda_unavailable_reason,
        "devices": [
            {**device.model_dump(), **(live[device.index].model_dump() if device.index in live else {})}
            for device in (discovery.devices if discovery else [])
        ],
        "host": _host(node),
        "links": [link.model_dump(mode="json") for link in discovery.links] if discovery else [],
        "models": [
            {
                **engine.view.model_dump(exclude={"endpoint"}),
                **told_facts([engine.view]),
                **({} if engine.view.servable is None else {"servable": engine.view.servable.model_dump()}),
                "activity": activity.model_dump(exclude={"id"}) if (activity := engine.activity) else None,
            }
            for engine in node.every_engine()
        ],
        "activation": node.health.activation.model_dump() if node.health and node.health.activation else None,
    }
