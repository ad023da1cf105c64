"""Which engines that span several neurons have lost a part, by what the neurons list."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from cortex.fleet.groups import groups_of
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot, by_instance
from shared.protocol import GroupPart, ModelView
from tests.cortex.fleets import node

MODEL = "org/wide"


def host(name: str, rank: int, status: str = "loaded", *, healthy: bool = True) -> NodeSnapshot:
    """A neuron with one of two parts. An unloaded engine has no group."""
    group = GroupPart(id="g", rank=rank, size=2, master_addr="10.0.0.1", master_port=21000)
    entry = ModelView(id=MODEL, instance="0", status=status, group=None if status == "unloaded" else group)
    return replace(node(name, 24000, healthy=healthy), models=MappingProxyType(by_instance([entry])))


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (host("a", 0), host("b", 1), None),
        (host("a", 0), host("b", 1, "loading"), None),
        (host("a", 0), host("b", 1, "unloaded"), ["a"]),
        (host("a", 0), host("b", 1, "failed"), ["a"]),
        (host("a", 0), host("b", 1, healthy=False), ["a"]),
        (host("a", 0, healthy=False), host("b", 1), ["b"]),
        (host("a", 0, "failed"), host("b", 1, "failed"), None),
        # Nothing can be done before that neuron is back: looking at it again and again would only fill the log.
        (host("a", 0, "unloaded"), host("b", 1, healthy=False), None),
        (host("a", 0, healthy=False), host("b", 1, healthy=False), None),
    ],
)
def test_parts_to_take_down(first: NodeSnapshot, second: NodeSnapshot, left: list[str] | None) -> None:
    """`left`: the neurons whose parts can be unloaded, None if there is nothing to do."""
    fleet = FleetSnapshot({each.name: each for each in (first, second)})
    found = [group for group in groups_of(fleet, [MODEL]) if group.lacks_parts]
    assert [[part.node.name for part in group.reachable] for group in found] == ([] if left is None else [left])
