"""Where a model can go and where it goes best. Pure: a profile and a snapshot in, a choice with its reasons out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations

from cortex.catalogue import ModelProfile
from cortex.snapshot import FleetSnapshot, NodeSnapshot
from shared.protocol import Device, Link, LinkKind

MAX_DEVICE_SETS = 20_000
"""Device sets that are compared on one node; a host with more than 16 GPUs is cut to its best ones first."""


class Fit(IntEnum):
    """How a model fits on a node, best first."""

    NOW = 0  # into VRAM that is free
    AFTER_DISPLACEMENT = 1  # into the devices, once what is there has left
    TOO_LARGE = 2  # not even then by `vram_mb`; still feasible, because `vram_mb` is an estimate


@dataclass(frozen=True)
class Candidate:
    """A node that can hold the model, the devices it would use there, and how well that fits.

    `spare_mb` is what stays free on these devices (MiB, all together; negative: what is missing).
    """

    node: str
    devices: tuple[int, ...]
    fit: Fit
    spare_mb: int
    reason: str


def infeasible_reason(profile: ModelProfile, node: NodeSnapshot) -> str | None:
    """Why the node's topology can never hold the model; None when it can, or when it is not known yet.

    The rules of the contract; `vram_mb` is not among them. Health is no matter here.
    """
    if profile.pinned_on and node.name not in profile.pinned_on:
        return f"pinned on {', '.join(profile.pinned_on)}"
    if node.discovery is None:
        return None
    if profile.harness not in node.discovery.harnesses:
        offered = ", ".join(node.discovery.harnesses) or "none"
        return f"harness {profile.harness!r} is not offered (offered: {offered})"
    if len(node.devices) < profile.min_devices:
        return f"needs {profile.min_devices} devices, has {len(node.devices)}"
    eligible = len(_eligible(profile, node))
    if eligible < profile.min_devices:
        return (
            f"needs {profile.min_devices} devices with {profile.min_device_vram_mb} MiB in total, "
            f"{eligible} of {len(node.devices)} have that"
        )
    return None


def is_feasible(profile: ModelProfile, node: NodeSnapshot) -> bool:
    """True when the node's topology is known and can hold the model."""
    return node.discovery is not None and infeasible_reason(profile, node) is None


def place(profile: ModelProfile, fleet: FleetSnapshot) -> Candidate | None:
    """The best healthy node that takes new work, None when there is none."""
    open_nodes = (node for node in fleet.healthy if not node.draining and is_feasible(profile, node))
    return next(iter(candidates(profile, fleet, open_nodes)), None)


def candidates(profile: ModelProfile, fleet: FleetSnapshot, nodes: Iterable[NodeSnapshot]) -> list[Candidate]:
    """A candidate for each of the nodes, which must be feasible, best first."""
    found = [candidate_on(profile, fleet, node) for node in nodes]
    return sorted(found, key=lambda candidate: _preference(profile, candidate))


def candidate_on(profile: ModelProfile, fleet: FleetSnapshot, node: NodeSnapshot) -> Candidate:
    """The devices the model would get on this feasible node."""
    share = profile.device_share_mb
    devices = _choose_devices(profile, fleet, node)
    indices = tuple(sorted(device.index for device in devices))
    free = {device.index: _free_mb(fleet, node, device) for device in devices}
    spare = sum(free.values()) - share * len(devices)
    if all(free[index] >= share for index in indices):
        return Candidate(node.name, indices, Fit.NOW, spare, f"fits now with {spare} MiB to spare")
    missing = sum(max(0, share - mb) for mb in free.values())
    if all(device.vram_total_mb >= share for device in devices):
        reason = f"fits after displacement, {missing} MiB are missing now"
        return Candidate(node.name, indices, Fit.AFTER_DISPLACEMENT, spare, reason)
    reason = f"wants {share} MiB on each device, which is more than the devices have"
    return Candidate(node.name, indices, Fit.TOO_LARGE, spare, reason)


def _preference(profile: ModelProfile, candidate: Candidate) -> tuple[int, int, str]:
    """Fit first; then the tightest, so that big cards stay free for big models. A model of unknown size, and one that
    does not fit now, goes where most is free."""
    tightest = candidate.fit is Fit.NOW and profile.vram_mb is not None
    return candidate.fit, candidate.spare_mb if tightest else -candidate.spare_mb, candidate.node


def _eligible(profile: ModelProfile, node: NodeSnapshot) -> list[Device]:
    floor = profile.min_device_vram_mb or 0
    return [device for device in node.devices if device.vram_total_mb >= floor]


def _free_mb(fleet: FleetSnapshot, node: NodeSnapshot, device: Device) -> int:
    """Free now as the node measures it, less what loads under way will take, and no more than the node would promise;
    less what models that sleep there will want. The total when there is no measurement."""
    live = node.device_health.get(device.index)
    known = live is not None and (live.vram_used_mb or live.vram_free_mb)  # both 0: the driver does not say
    measured = live.vram_free_mb if live is not None and known else device.vram_total_mb
    room = measured - fleet.reserved_mb(node.name, device.index)
    if live is None or not known:
        return room
    if live.vram_bookable_mb is not None:  # somebody else's load has not taken all of its memory yet
        room = min(room, live.vram_bookable_mb)
    return room - (live.vram_asleep_mb or 0)


def _choose_devices(profile: ModelProfile, fleet: FleetSnapshot, node: NodeSnapshot) -> tuple[Device, ...]:
    """Devices with room first, then the best connected, then equals, then the tightest, then the lowest indices."""
    share = profile.device_share_mb
    free = {device.index: _free_mb(fleet, node, device) for device in node.devices}
    pool = sorted(_eligible(profile, node), key=lambda d: (max(0, share - free[d.index]), free[d.index], d.index))
    links = {} if node.discovery is None else {(link.a, link.b): link for link in node.discovery.links}

    def cost(devices: tuple[Device, ...]) -> tuple[int, int, int, int, tuple[int, ...]]:
        missing = sum(max(0, share - free[device.index]) for device in devices)
        totals = [device.vram_total_mb for device in devices]
        indices = tuple(sorted(device.index for device in devices))
        distance = max((_distance(links, a, b) for a, b in combinations(indices, 2)), default=0)
        room = sum(free[index] for index in indices)
        return missing, distance, max(totals) - min(totals), room if share else -room, indices

    return min(combinations(_bounded(pool, profile.min_devices), profile.min_devices), key=cost)


def _bounded(pool: list[Device], size: int) -> list[Device]:
    """As much of the pool as can be compared set by set; always enough for one set."""
    while len(pool) > size and _binomial(len(pool), size) > MAX_DEVICE_SETS:
        pool = pool[:-1]
    return pool


def _binomial(n: int, k: int) -> int:
    result = 1
    for i in range(min(k, n - k)):
        result = result * (n - i) // (i + 1)
    return result


_DISTANCE = {kind: rank for rank, kind in enumerate(LinkKind)}


def _distance(links: dict[tuple[int, int], Link], a: int, b: int) -> int:
    """0 for NVLink peers, growing with every level of the PCIe tree; unknown counts as farthest."""
    link = links.get((a, b))
    return len(LinkKind) if link is None else _DISTANCE[link.kind]
