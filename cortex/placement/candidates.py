"""The nodes that are worth a closer look, of a fleet of hundreds. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import NodeSnapshot
from cortex.placement.feasibility import is_feasible
from cortex.placement.inputs import View

MANY = 64
"""A fleet of so many nodes is looked at in full; of a larger one as many are."""


def shortlist(view: View, profile: ModelProfile) -> list[NodeSnapshot]:
    """The nodes among which the best place is: all of a small fleet. Of a large one those that know the model, then
    those with room for it, the tightest first, or else those that lack least."""
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
    # Without a size the most room is best; what lacks anything comes after all that have room.
    rooms.sort(key=lambda each: (each[0] < share, each[0] if 0 < share <= each[0] else -each[0], each[1]))
    return (node for _, _, node in rooms)
