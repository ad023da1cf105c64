"""The fleet as operators see it, as JSON: each neuron rendered again only when something about it has changed."""

from __future__ import annotations

import json
import time
from typing import Any

from aiohttp import web

from cortex.api.app_keys import Parts
from cortex.config.catalogue import Catalogue
from cortex.fleet.snapshot import NodeSnapshot

MIN_INTERVAL_SECS = 0.25
"""Between two pictures for one listener: a large fleet changes hundreds of times a second."""

_UPTIME_MARK = '"uptime_secs": '


class FleetView:
    """`GET /fleet`, and what `/fleet/events` sends. Times are Unix seconds, memory in MiB."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._nodes: dict[str, tuple[NodeSnapshot, bytes, bytes]] = {}  # what stands before and behind the uptime
        self._catalogue: tuple[Catalogue, bytes] | None = None
        self._event: tuple[int, float, bytes] | None = None  # of which version, when

    def body(self) -> bytes:
        """The whole picture, as it is now."""
        parts = self._parts
        fleet = parts.fleet.snapshot()
        rest = {
            "loads": [
                {
                    "model": job.model_id,
                    "node": job.node,
                    "started": job.started,
                    "reason": job.reason,
                    "because": job.why,
                    "phase": job.phase,
                    "evict": [each.resident.key[0] for each in job.plan.displacement.evictions],
                }
                for job in parts.loader.jobs()
            ],
            "in_flight": [
                {"model": model, "node": node, "count": count}
                for (model, node), count in sorted(parts.counts.all_in_flight().items())
            ],
            "waiting": [
                {"model": model, "count": waiting.count, "for": parts.scheduler.note(model)}
                for model, waiting in sorted(parts.rooms.waiting().items())
            ],
            "configuration": {
                "loaded_at": parts.live.loaded_at,
                "files": list(parts.live.files),
                "error": parts.live.error,
            },
        }
        pieces: list[bytes] = []
        for node in fleet.nodes.values():
            pieces += (b", ", *self._node(node))
        if len(self._nodes) > len(fleet.nodes):
            self._nodes = {name: known for name, known in self._nodes.items() if name in fleet.nodes}
        return b"".join(
            (
                b'{"nodes": [',
                *pieces[1:],
                b"], ",
                json.dumps(rest)[1:-1].encode(),
                b", ",
                self._of_catalogue(parts.catalogue),
                b"}",
            )
        )

    def event(self) -> tuple[int, bytes]:
        """The picture as a server-sent event, with the fleet's version that it is of. Listeners share one for as long
        as it is good enough for each of them."""
        now, version = time.monotonic(), self._parts.fleet.version
        known = self._event
        if known is None or known[0] != version or now - known[1] >= MIN_INTERVAL_SECS:
            known = self._event = version, now, b"event: fleet\ndata: " + self.body() + b"\n\n"
        return known[0], known[2]

    def _node(self, node: NodeSnapshot) -> tuple[bytes, bytes, bytes]:
        known = self._nodes.get(node.name)
        if known is None or known[0] is not node:
            opening, mark, rest = json.dumps(_node(node)).partition(f"{_UPTIME_MARK}null")
            known = self._nodes[node.name] = node, (opening + mark.removesuffix("null")).encode(), rest.encode()
        return known[1], _uptime(node), known[2]

    def _of_catalogue(self, catalogue: Catalogue) -> bytes:
        if self._catalogue is None or self._catalogue[0] is not catalogue:
            models = [profile.model_dump(exclude_none=True) for profile in catalogue.models]
            self._catalogue = catalogue, json.dumps({"models": models, "aliases": catalogue.aliases})[1:-1].encode()
        return self._catalogue[1]


PICTURE = web.AppKey("picture", FleetView)


def _uptime(node: NodeSnapshot) -> bytes:
    """It goes on by itself while the neuron answers; what it was is not told again by every poll."""
    if node.health is None:
        return b"null"
    since = time.monotonic() - node.health_at if node.healthy else 0.0
    return b"%.3f" % (node.health.uptime_secs + since)


def _node(node: NodeSnapshot) -> dict[str, Any]:
    """Without its uptime, which is null here."""
    discovery = node.discovery
    live = node.device_health
    return {
        "name": node.name,
        "endpoint": node.endpoint,
        "healthy": node.healthy,
        "draining": node.draining,
        "misses": node.misses,
        "last_error": node.last_error,
        "hostname": discovery and discovery.hostname,
        "version": discovery and discovery.version,
        "simulated": discovery and discovery.simulated,
        "harnesses": discovery.harnesses if discovery else [],
        "cuda_unavailable_reason": discovery and discovery.cuda_unavailable_reason,
        "uptime_secs": None,
        "devices": [
            {**device.model_dump(), **(live[device.index].model_dump() if device.index in live else {})}
            for device in (discovery.devices if discovery else [])
        ],
        "links": [link.model_dump(mode="json") for link in discovery.links] if discovery else [],
        "models": [
            {
                **view.model_dump(),
                "activity": activity.model_dump(exclude={"id"}) if (activity := node.activity.get(view.id)) else None,
            }
            for view in node.models.values()
        ],
        "activation": node.health.activation.model_dump() if node.health and node.health.activation else None,
    }
