"""Narrows a large fleet to the nodes worth evaluating in full. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import islice

from cortex.config.profile import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.feasibility import is_feasible
from cortex.placement.inputs import PlanningView
from cortex.placement.instances import instances_on

MAX_CANDIDATES = 64
"""Fleets up to this size are evaluated in full; in larger ones at most this many nodes are."""


def candidate_nodes(view: PlanningView, profile: ModelProfile) -> list[NodeSnapshot]:
    """The nodes to evaluate in full: all of a small fleet. In a large one, the nodes that know the model, then those
    with memory for it, without an instance of it first, tightest first, then those that lack the least."""
    fleet = view.fleet
    if len(fleet.nodes) <= MAX_CANDIDATES:
        return list(fleet.nodes.values())
    occupied = {node.name for node in fleet.holders(profile.id) if instances_on(view, profile.id, node).count}
    occupied |= {each.node for each in fleet.reservations if each.model_id == profile.id}
    known = (node for node in fleet.holders(profile.id) if node.name not in occupied)
    chosen = {node.name: node for node in islice(known, MAX_CANDIDATES)}
    for position, choice in enumerate(profile.choices):  # each variant gets its share of the rest
        limit = len(chosen) + (MAX_CANDIDATES - len(chosen)) // (len(profile.choices) - position)
        for node in _by_free_memory(view, choice, occupied):
            if len(chosen) >= limit:
                break
            if is_feasible(choice, node):
                chosen[node.name] = node
    return list(chosen.values())


def _by_free_memory(view: PlanningView, profile: ModelProfile, occupied: Container[str]) -> Iterator[NodeSnapshot]:
    share, size, nodes = view.device_share_mb(profile), profile.device_count, view.fleet.nodes
    names = profile.pinned_on or nodes
    found: list[tuple[bool, bool, int, int, NodeSnapshot]] = []
    for position, node in enumerate(nodes[name] for name in names if name in nodes):
        free_mb = node.free_mb_on_each_of(size)
        if free_mb is None or not node.healthy or node.draining:
            continue
        # Unknown size: most memory first. Nodes that lack memory come after all that have it.
        fit = node.tightest_fit_mb(size, share) if 0 < share <= free_mb else None
        found.append((free_mb < share, node.name in occupied, -free_mb if fit is None else fit, position, node))
    found.sort()  # never compares nodes: positions differ
    return (node for *_, node in found)
