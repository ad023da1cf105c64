"""Which neurons can hold which models, for large fleets and catalogues: worked out once for each kind of topology."""

from __future__ import annotations

from typing import NamedTuple

from cortex.config.catalogue import ModelProfile
from cortex.fleet.snapshot import FleetSnapshot, NodeSnapshot
from cortex.placement.feasibility import infeasible_reason
from shared.protocol import Discovery


class Topology(NamedTuple):
    """What counts of a neuron. Those that have it in common can hold the same models."""

    harnesses: frozenset[str]
    totals_mb: tuple[int, ...]  # of the devices that can be used, ascending


class Need(NamedTuple):
    """What counts of a model, but for the neurons that it is pinned on."""

    harness: str
    min_devices: int
    min_device_vram_mb: int | None


class Feasibility:
    """`placement.is_feasible` for whole fleets. It says nothing that the snapshot asked about does not; what is kept
    from one question to the next is only what is the same for both."""

    def __init__(self) -> None:
        self._followed: object = None  # the topology of the snapshot that the rest is true to
        self._discoveries: dict[str, Discovery | None] = {}
        self._topologies: dict[str, Topology | None] = {}  # in the order of the configuration
        self._position: dict[str, int] = {}
        self._examples: dict[Topology, NodeSnapshot] = {}
        self._verdicts: dict[tuple[Need, Topology], bool] = {}
        self._found: dict[tuple[Need, tuple[str, ...]], tuple[str, ...]] = {}
        self._outdated: dict[tuple[Need, tuple[str, ...]], tuple[str, ...]] = {}

    def nodes(self, profile: ModelProfile, fleet: FleetSnapshot) -> tuple[str, ...]:
        """The neurons whose topology is known and can hold the model, whatever their health, in the order of the
        configuration. The same object as long as the answer is the same."""
        if fleet.topology is None or fleet.topology is not self._followed:
            self._follow(fleet)
        need = Need(profile.harness, profile.min_devices, profile.min_device_vram_mb)
        key = need, profile.pinned_on
        found = self._found.get(key)
        if found is None:
            found, before = self._find(need, profile), self._outdated.pop(key, None)
            found = self._found[key] = before if before == found else found
        return found

    def _follow(self, fleet: FleetSnapshot) -> None:
        """Looks at every neuron, and forgets what has been found if any is another kind than it was."""
        before = self._topologies
        topologies: dict[str, Topology | None] = {}
        for name, node in fleet.nodes.items():
            if name in before and self._discoveries[name] is node.discovery:
                topologies[name] = before[name]
            else:
                topologies[name] = _topology(node)
                self._discoveries[name] = node.discovery
            topology = topologies[name]
            if topology is not None and topology not in self._examples:
                self._examples[topology] = node
        if list(topologies.items()) != list(before.items()):
            self._topologies = topologies
            self._position = {name: position for position, name in enumerate(topologies)}
            self._discoveries = {name: self._discoveries[name] for name in topologies}
            kinds = {topology for topology in topologies.values() if topology is not None}
            self._examples = {topology: self._examples[topology] for topology in kinds}
            self._verdicts = {key: verdict for key, verdict in self._verdicts.items() if key[1] in kinds}
            self._outdated |= self._found
            self._found = {}
        self._followed = fleet.topology

    def _find(self, need: Need, profile: ModelProfile) -> tuple[str, ...]:
        names = sorted(self._position.keys() & profile.pinned_on, key=self._position.__getitem__)
        return tuple(name for name in names or self._everyone(profile) if self._holds(need, profile, name))

    def _everyone(self, profile: ModelProfile) -> list[str]:
        return [] if profile.pinned_on else list(self._position)

    def _holds(self, need: Need, profile: ModelProfile, name: str) -> bool:
        topology = self._topologies[name]
        if topology is None:
            return False
        verdict = self._verdicts.get((need, topology))
        if verdict is None:
            anywhere = profile.model_copy(update={"pinned_on": ()})
            verdict = infeasible_reason(anywhere, self._examples[topology]) is None
            self._verdicts[need, topology] = verdict
        return verdict


def _topology(node: NodeSnapshot) -> Topology | None:
    if node.discovery is None:
        return None
    totals = tuple(sorted(device.vram_total_mb for device in node.devices))
    return Topology(frozenset(node.discovery.harnesses), totals)
