"""Narrows a large fleet to the nodes worth evaluating in full. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.feasibility import is_feasible
from cortex.placement.inputs import View

MANY = 64
"""Fleets up to this size are evaluated in full; in larger ones at most this many nodes are."""


def shortlist(view: View, profile: ModelProfile) -> list[NodeSnapshot]:
    """The nodes to evaluate in full: all of a small fleet. In a large one, the nodes that know the model, then those
    with room for it, tightest first, then those that lack the least."""
    fleet = view.fleet
    if len(fleet.nodes) <= MANY:
        return list(fleet.nodes.values())
    chosen = {node.name: node for node in fleet.holders(profile.id)}
    for node in _by_room(view, profile):
        if len(chosen) >= MANY:
            break
        if is_feasible(profile, node):
            chosen[node.name] = node
    return list(chosen.values())


def _by_room(view: View, profile: ModelProfile) -> Iterator[NodeSnapshot]:
    share, size, nodes = view.share_mb(profile), profile.min_devices, view.fleet.nodes
    names = profile.pinned_on or nodes
    here = (nodes[name] for name in names if name in nodes)
    rooms = [
        (room, position, node)
        for position, node in enumerate(here)
        if node.healthy and not node.draining and (room := node.room_mb(size)) is not None
    ]
    # Unknown size: most room first. Nodes that lack room come after all that have it.
    rooms.sort(key=lambda each: (each[0] < share, each[0] if 0 < share <= each[0] else -each[0], each[1]))
    return (node for _, _, node in rooms)
